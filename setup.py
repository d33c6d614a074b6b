"""Builds `tokenprune_kernels._C`: one abi3 extension on the LibTorch stable ABI, compiled with ninja.

Switches, read here and printed in the build log:
  TOKENPRUNE_CUDA=auto|0|1   CUDA kernels: when sources and nvcc are there (default), never, or always (error without nvcc)
  TOKENPRUNE_CPU=auto|0|1    compiled CPU kernels: when a compiler is there (default), never, or always (error without)
  CUDA_HOME, TORCH_CUDA_ARCH_LIST (default "8.0;9.0a;10.0+PTX"), MAX_JOBS, CXX, CXXFLAGS
  TOKENPRUNE_WERROR=1        compiler warnings are errors
  TOKENPRUNE_SANITIZE=1      AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]  # torch 2.10, CPython 3.10
# Warnings are errors in development and CI; a user's newer compiler must not fail an installation.
WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("TOKENPRUNE_WERROR") == "1" else [])]

# The files below csrc/cpu/simd are compiled once per capability, in a namespace of that name; the best one that the
# machine has is chosen at run time. Everything else is compiled for the baseline, so that one binary runs anywhere.
CAPABILITIES = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    }
}


def capabilities() -> dict[str, list[str]]:
    return CAPABILITIES.get(platform.machine(), {"baseline": []})


def wanted(switch: str) -> str:
    value = os.environ.get(switch, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{switch} must be auto, 0 or 1, got {value!r}")
    return value


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def nvcc_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST as -gencode flags; +PTX embeds the intermediate code of that architecture."""
    flags = []
    for entry in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX").strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: cannot read {entry!r}, expected for instance 9.0a or 10.0+PTX")
        number = "".join(match.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def torch_paths() -> tuple[list[str], str]:
    """Include folders and library folder of the torch that is installed, without initialising it."""
    import torch.utils.cpp_extension as cpp

    return [p for p in cpp.include_paths() if Path(p).is_dir()], cpp.library_paths()[0]


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it; without a compiler (and none demanded) the package installs without a binary."""

    built = False

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.compile(target)
            self.built = True
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted("TOKENPRUNE_CPU") == "1" or not isinstance(error, FileNotFoundError):
                raise SystemExit(f"building {ext.name} failed: {error}") from error
            self.warn(f"{error.filename} was not found: installing without compiled kernels, the references serve")

    def copy_extensions_to_source(self) -> None:
        self.extensions = [e for e in self.extensions if self.built]
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if self.built else []

    def compile(self, target: Path) -> None:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            raise FileNotFoundError(2, "no such program", os.environ.get("CXX", "g++"))
        nvcc = find_nvcc()
        cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        cuda = wanted("TOKENPRUNE_CUDA")
        if cuda == "1" and (nvcc is None or not Path(nvcc).exists()):
            raise SystemExit("TOKENPRUNE_CUDA=1, but nvcc was not found: set CUDA_HOME or put nvcc on PATH")
        use_cuda = cuda != "0" and nvcc is not None and bool(cuda_sources)
        print(f"tokenprune: C++ compiler {compiler}, CUDA {'with ' + str(nvcc) if use_cuda else 'off'}", flush=True)

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.ninja_file(target, compiler, nvcc if use_cuda else None, cuda_sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS")
        command = [sys.executable, "-m", "ninja"] if not shutil.which("ninja") else ["ninja"]
        subprocess.run([*command, "-C", str(build), *(["-j", jobs] if jobs else [])], check=True)

    def ninja_file(self, target: Path, compiler: str, nvcc: str | None, cuda_sources: list[Path]) -> str:
        includes, library = torch_paths()
        include_flags = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        include_flags += [f"-isystem {p}" for p in [*includes, sysconfig.get_path("include")]]
        sanitize = os.environ.get("TOKENPRUNE_SANITIZE") == "1"
        checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else []
        levels = ["-O1", "-g"] if sanitize else ["-O3", "-DNDEBUG"]
        info = f'-DTOKENPRUNE_CAPABILITIES=\\"{",".join(capabilities())}\\"'
        common = [
            "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
            *levels, *checks, *WARNINGS, *STABLE_ABI, info, *include_flags, os.environ.get("CXXFLAGS", ""),
        ]  # fmt: skip
        link = ["-shared", *checks, *([] if sanitize else ["-s"]), f"-L{library}", "-ltorch_cpu"]
        lines = [
            "ninja_required_version = 1.3",
            f"cxx = {compiler}",
            f"flags = {' '.join(common)}",
            "rule cxx\n  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = $cxx $in -o $out {' '.join(link)} $libs",
        ]
        objects = []

        def add(source: Path, suffix: str, extra: list[str]) -> None:
            name = f"{source.relative_to(ROOT / 'csrc').with_suffix('')}.{suffix}.o"
            objects.append(name)
            lines.append(f"build {name}: cxx {source}\n  extra = {' '.join(extra)}")

        add(ROOT / "csrc" / "ops.cpp", "o", [])
        add(ROOT / "csrc" / "tensor.cpp", "o", [])
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            add(source, "o", [])
        for source in sorted((ROOT / "csrc" / "cpu" / "simd").glob("*.cpp")):
            for name, flags in capabilities().items():
                add(source, name, [f"-DTOKENPRUNE_SIMD={name}", f"-DTOKENPRUNE_SIMD_{name.upper()}", *flags])
        libs = []
        if nvcc is not None:
            host = ["-fPIC", "-fvisibility=hidden", *WARNINGS]
            cuda_flags = ["-std=c++17", "-O3", "-lineinfo", *nvcc_architectures(), "-cudart", "static", *STABLE_ABI]
            cuda_flags += [f"-Xcompiler={','.join(host)}", *include_flags]
            lines.append(f"rule nvcc\n  command = {nvcc} {' '.join(cuda_flags)} -MD -MF $out.d -c $in -o $out")
            lines.append("  depfile = $out.d\n  deps = gcc")
            for source in cuda_sources:
                objects.append(f"cuda/{source.stem}.o")
                lines.append(f"build cuda/{source.stem}.o: nvcc {source}")
            toolkit = Path(nvcc).resolve().parent.parent
            libs = [f"-L{toolkit / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        lines.append(f"build {target}: link {' '.join(objects)}\n  libs = {' '.join(libs)}")
        return "\n".join(lines) + "\n"


def bdist_wheel_options() -> dict[str, dict[str, str]]:
    return {"bdist_wheel": {"py_limited_api": "cp310"}}


compiled = [] if wanted("TOKENPRUNE_CPU") == "0" else [Extension("tokenprune_kernels._C", [], py_limited_api=True)]
setup(
    ext_modules=compiled,
    cmdclass={"build_ext": NinjaBuild},
    options=bdist_wheel_options() if compiled else {},
)
