"""Builds `tokenprune_kernels._C`: one abi3 extension on the LibTorch stable ABI, compiled with ninja.

Switches, read here and printed in the build log:
  TOKENPRUNE_CPU=auto|0|1    compiled kernels: when a compiler is there (default), never, or always (error without one)
  TOKENPRUNE_CUDA=auto|0|1   CUDA kernels: where nvcc is, and torch has CUDA or TORCH_CUDA_ARCH_LIST is set (default);
                             never; always (error without nvcc)
  TORCH_CUDA_ARCH_LIST       architectures, such as "8.0;9.0a;12.0+PTX", "90a", "Hopper" or "native" (the GPUs here);
                             default: native where there is a GPU that the kernels run on, else "8.0;9.0a;10.0+PTX"
  CUDA_HOME, MAX_JOBS, CXX, CXXFLAGS, LDFLAGS
  TOKENPRUNE_WERROR=1        compiler warnings are errors
  TOKENPRUNE_SANITIZE=1      AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`
"""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_FLOOR = "2.10"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]  # torch 2.10, CPython 3.10
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX"
# torch's names of the architectures that the kernels run on. "a" is for instructions of Hopper alone.
NAMED_ARCHITECTURES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0a", "Blackwell": "10.0;12.0"}
OLDEST_ARCHITECTURE = 8

# The files below csrc/cpu/simd are compiled once per capability, in a namespace of that name; the best one that the
# machine has is chosen at run time. Everything else is compiled for the baseline, so that one binary runs anywhere.
CAPABILITIES = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    }
}
# Fused multiply-adds only where the vector code wants them: scalar code gives the same bits on every machine.
CONTRACT_VECTORS, CONTRACT_SCALARS = "-ffp-contract=fast", "-ffp-contract=off"


def capabilities() -> dict[str, list[str]]:
    return CAPABILITIES.get(platform.machine(), {"baseline": []})


def wanted(switch: str) -> str:
    value = os.environ.get(switch) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{switch} must be auto, 0 or 1, got {value!r}")
    return value


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command (CXX may carry words in front, such as ccache), or None."""
    for candidate in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]:
        program, *words = shlex.split(candidate)
        if found := shutil.which(program):
            return [found, *words]
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def asks_for_cuda() -> bool:
    """Kernels that nobody can launch would be most of the build: torch has CUDA, or somebody named architectures."""
    return bool(os.environ.get("TORCH_CUDA_ARCH_LIST") or torch_says(torch_folder())["cuda"])


def cuda_compiler(sources: list[Path]) -> str | None:
    """The nvcc to use, None for a build without CUDA kernels; an error when CUDA was demanded and cannot be had."""
    wish, nvcc = wanted("TOKENPRUNE_CUDA"), find_nvcc()
    if wish == "1" and nvcc is None:
        where = f"in CUDA_HOME={os.environ['CUDA_HOME']}" if os.environ.get("CUDA_HOME") else "on PATH"
        raise SystemExit(f"TOKENPRUNE_CUDA=1, but nvcc was not found {where}: set CUDA_HOME or put nvcc on PATH")
    if wish == "1" and not sources:
        raise SystemExit("TOKENPRUNE_CUDA=1, but this version has no CUDA sources (csrc/cuda/*.cu)")
    return nvcc if sources and (wish == "1" or (wish == "auto" and asks_for_cuda())) else None


def toolkit_folder(nvcc: str) -> Path:
    """nvcc may be a wrapper script somewhere else, so it is asked where its toolkit is."""
    told = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True)
    top = re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE)
    if top is None:
        raise SystemExit(f"{nvcc} does not say where its toolkit is")
    return Path(top.group(1).strip()).resolve()


def compression(nvcc: str) -> list[str]:
    """The smallest machine code; drivers from R550 unpack it, and the runtime of CUDA 13 needs R580 anyway."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.", told)
    return ["--compress-mode=size"] if release and int(release[1]) >= 13 else []


def native_architectures() -> list[str]:
    """Those of the GPUs here that the kernels run on, by nvidia-smi, because torch need not be importable."""
    smi = shutil.which("nvidia-smi")
    ask = [smi or "", "--query-gpu=compute_cap", "--format=csv,noheader"]
    told = subprocess.run(ask, capture_output=True, text=True).stdout if smi else ""
    found = sorted({tuple(map(int, match)) for match in re.findall(r"^(\d+)\.(\d)$", told, re.MULTILINE)})
    return [f"{major}.{minor}{'a' * (major == 9)}" for major, minor in found if major >= OLDEST_ARCHITECTURE]


def architectures() -> list[str]:
    """The entries of TORCH_CUDA_ARCH_LIST as torch spells them: "9.0a", "12.0+PTX"."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; \t")
    if not wish:
        return native_architectures() or DEFAULT_ARCHITECTURES.split(";")
    found: list[str] = []
    for entry in re.split(r"[;,\s]+", wish):
        name, plus, ptx = entry.partition("+")
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)", name)
        if entry == "native":
            spelled = native_architectures()
            if not spelled:
                raise SystemExit("TORCH_CUDA_ARCH_LIST=native, but nvidia-smi shows no GPU of capability 8.0 or newer")
        elif match:
            spelled = [f"{match[1]}.{match[2]}{match[3]}"]
        elif name in NAMED_ARCHITECTURES:
            spelled = NAMED_ARCHITECTURES[name].split(";")
        else:
            spelled = []
        if not spelled or ptx not in ("", "PTX"):
            names = ", ".join(NAMED_ARCHITECTURES)
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: cannot read {entry!r}, expected for instance 9.0a, 10.0+PTX, native or {names}"
            )
        if int(spelled[0].split(".")[0]) < OLDEST_ARCHITECTURE:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: the kernels need 8.0 (Ampere) or newer, got {entry!r}")
        found += [*spelled[:-1], spelled[-1] + plus + ptx]
    return list(dict.fromkeys(found))


def nvcc_architectures(entries: list[str]) -> list[str]:
    """The architectures as -gencode flags; +PTX embeds the intermediate code of that architecture."""
    flags = []
    for entry in entries:
        name, _, ptx = entry.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def installed_torch() -> Path | None:
    """Where torch lies; where a build is isolated from the environment that it is for, the torch of that environment.

    Isolation by pip takes the environment's packages off the search path alone; isolation by a virtual environment of
    its own leaves VIRTUAL_ENV, where the other one is activated.
    """
    prefixes = [*site.PREFIXES, *filter(None, [os.environ.get("VIRTUAL_ENV")])]
    spec = importlib.util.find_spec("torch") or importlib.machinery.PathFinder.find_spec(
        "torch", site.getsitepackages(prefixes)
    )
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def torch_says(folder: Path) -> dict[str, Any]:
    """`torch.version`; torch is not imported, only its headers and libtorch_cpu are needed."""
    return runpy.run_path(str(folder / "version.py"))


def new_enough(torch: Path) -> bool:
    found, floor = ([int(part) for part in v.split(".")[:2]] for v in (torch_says(torch)["__version__"], TORCH_FLOOR))
    return found >= floor


def torch_folder() -> Path:
    """Where the torch to build against lies."""
    torch = installed_torch()
    if torch is None or not new_enough(torch):
        found = torch_says(torch)["__version__"] if torch else "none"
        raise SystemExit(
            f"building needs torch >= {TORCH_FLOOR} in this environment, found {found}: install it, or build without"
            " --no-build-isolation"
        )
    return torch


def ninja_command() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if found := shutil.which("ninja"):
        return [found]
    raise SystemExit("building needs ninja: pip install ninja")


def write_if_changed(file: Path, text: str) -> None:
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def shell(words: list[str]) -> str:
    """A command line for a ninja rule."""
    return shlex.join(words).replace("$", "$$")


def path(name: object) -> str:
    """A path in a ninja build line."""
    return re.sub(r"([$ :])", r"$\1", str(name))


def prepared(build: Path, target: Path, compiler: list[str], nvcc: str | None, cuda_sources: list[Path]) -> list[str]:
    """Writes what ninja needs into the folder `build`; the command that builds `target` there."""
    write_if_changed(build / "exports", "{ global: PyInit__C; local: *; };\n")
    write_if_changed(build / "build.ninja", ninja_file(target, compiler, nvcc, cuda_sources))
    jobs = os.environ.get("MAX_JOBS")
    return [*ninja_command(), "-C", str(build), *(["-j", jobs] if jobs else [])]


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            raise SystemExit(
                f"{os.environ.get('CXX') or 'g++'} was not found; TOKENPRUNE_CPU=0 does without a compiler"
            )
        cuda_sources = sorted((CSRC / "cuda").glob("*.cu"))
        nvcc = cuda_compiler(cuda_sources)
        print(f"tokenprune: C++ compiler {shlex.join(compiler)}, CUDA {f'with {nvcc}' if nvcc else 'off'}", flush=True)
        # pip gives an editable installation a temporary folder; the permanent one keeps its builds incremental.
        permanent = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        build = permanent if self.editable_mode else Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        for folder in (build, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        detail = ["--verbose"] if self.verbose > 1 else []
        if subprocess.run([*prepared(build, target, compiler, nvcc, cuda_sources), *detail]).returncode:
            raise SystemExit(f"building {ext.name} failed, see above; TOKENPRUNE_CPU=0 installs without it")


def ninja_file(target: Path, compiler: list[str], nvcc: str | None, cuda_sources: list[Path]) -> str:
    torch = torch_folder()
    includes = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    for folder in (torch / "include", sysconfig.get_path("include")):
        includes += ["-isystem", str(folder)]
    # Warnings are errors in development and CI; a user's newer compiler must not fail an installation.
    warnings = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("TOKENPRUNE_WERROR") == "1" else [])]
    sanitize = os.environ.get("TOKENPRUNE_SANITIZE") == "1"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else []
    common = [
        "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
        *(["-O1", "-g"] if sanitize else ["-O3", "-DNDEBUG"]), *checks, *warnings, *STABLE_ABI,
        f'-DTOKENPRUNE_CAPABILITIES="{",".join(capabilities())}"', *includes,
    ]  # fmt: skip
    # Only the module's entry is exported: templates of the standard library would otherwise be visible too.
    finish = checks if sanitize else ["-s", "-Wl,--version-script=exports"]
    link = ["-shared", *finish, f"-L{torch / 'lib'}", "-ltorch_cpu", *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = [
        "ninja_required_version = 1.3",
        f"rule cxx\n  command = {shell(compiler + common)} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = CXX $out",
        f"rule link\n  command = {shell(compiler)} $in -o $out {shell(link)} $libs\n  description = LINK $out",
    ]
    objects = []

    def add(source: Path, suffix: str, extra: list[str]) -> None:
        name = f"{source.relative_to(CSRC).with_suffix('')}.{suffix}"
        objects.append(name)
        extra = [*extra, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        lines.append(f"build {path(name)}: cxx {path(source)}\n  extra = {shell(extra)}")

    built_for = architectures() if nvcc else []
    for source in sorted([*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]):
        define = [f'-DTOKENPRUNE_CUDA_ARCHITECTURES="{";".join(built_for)}"'] if source.name == "ops.cpp" else []
        add(source, "o", [CONTRACT_SCALARS, *define])
    for source in sorted((CSRC / "cpu" / "simd").glob("*.cpp")):
        for name, flags in capabilities().items():
            defines = [f"-DTOKENPRUNE_SIMD={name}", f"-DTOKENPRUNE_SIMD_{name.upper()}"]
            add(source, f"{name}.o", [CONTRACT_VECTORS, *defines, *flags])
    libs: list[str] = []
    if nvcc is not None:
        toolkit = toolkit_folder(nvcc)
        for source in sorted((CSRC / "cuda").glob("*.cpp")):
            add(source, "o", ["-isystem", str(toolkit / "include")])
        # The kernels see no torch header. ptxas reports registers, shared memory and spills of every kernel into a
        # file beside the object, where the budget test reads them.
        strict = ["-Werror", "all-warnings"] if os.environ.get("TOKENPRUNE_WERROR") == "1" else []
        host = f"-Xcompiler={','.join(['-fPIC', '-fvisibility=hidden', '-Wall'])}"
        words = [
            nvcc, "-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v,-warn-spills", *strict, *compression(nvcc),
            *nvcc_architectures(built_for), host,
        ]  # fmt: skip
        command = f"{shell([*words, '-I' + str(CSRC / 'include')])} -MD -MF $out.d -c $in -o $out"
        lines.append(f"rule nvcc\n  command = {command} > $out.log 2>&1 || {{ cat $out.log; exit 1; }}")
        lines.append("  depfile = $out.d\n  deps = gcc\n  description = NVCC $out")
        for source in cuda_sources:
            objects.append(f"cuda/{source.stem}.cu.o")
            lines.append(f"build {path(objects[-1])}: nvcc {path(source)}")
        libs = [f"-L{toolkit / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    lines.append(f"build {path(target)}: link {' '.join(map(path, objects))} | exports\n  libs = {shell(libs)}")
    return "\n".join(lines) + "\n"


def wants_binary() -> bool:
    """Without a compiler, and away from Linux, the package installs pure: the references and Triton serve."""
    wish = wanted("TOKENPRUNE_CPU")
    if wish == "0" and wanted("TOKENPRUNE_CUDA") == "1":
        raise SystemExit("TOKENPRUNE_CUDA=1 contradicts TOKENPRUNE_CPU=0: both kinds of kernels are in one library")
    if wish == "auto" and wanted("TOKENPRUNE_CUDA") != "1" and (sys.platform != "linux" or find_compiler() is None):
        print("tokenprune: no C++ compiler, installing without compiled kernels", flush=True)
        return False
    return wish != "0"


def options(compiled: bool) -> dict[str, dict[str, str]]:
    chosen = {"bdist_wheel": {"py_limited_api": "cp310"}} if compiled else {}
    if not os.access(ROOT, os.W_OK):  # a read-only checkout: setuptools would write next to the sources
        elsewhere = tempfile.mkdtemp(prefix="tokenprune-build-")
        atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
        chosen |= {"egg_info": {"egg_base": elsewhere}, "build": {"build_base": elsewhere}}
    return chosen


if __name__ == "__main__":
    compiled = wants_binary()
    setup(
        ext_modules=[Extension("tokenprune_kernels._C", [], py_limited_api=True)] if compiled else [],
        cmdclass={"build_ext": NinjaBuild},
        options=options(compiled),
    )
