"""Compiles the CUDA kernels and their bindings with g++ against the emulator's headers, with ninja.

TOKENPRUNE_EMULATOR_SANITIZE=1 builds with AddressSanitizer, in a folder of its own.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CSRC = ROOT / "csrc"
MODULE = sysconfig.get_config_var("EXT_SUFFIX")
# The emulator itself, which knows nothing of this project.
RUNTIME = sorted((HERE / "runtime").glob("*.cpp"))
# What binds the kernels of this project, and the kernels.
PROJECT = [*sorted((HERE / "kernels").glob("*.cpp")), *sorted((CSRC / "cuda").glob("*.c*")), CSRC / "tensor.cpp"]
# Kernels that make mistakes, for the tests of the emulator.
BROKEN = HERE / "broken"


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def flags(instrument: list[str]) -> list[str]:
    systems = [torch_folder() / "include", sysconfig.get_path("include"), pybind11.get_include()]
    return [
        "-std=c++17", "-fPIC", "-g1", "-O1", "-ffp-contract=off", "-mavx2", "-mfma", "-mf16c",
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes", *instrument,
        "-DTOKENPRUNE_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{CSRC / 'include'}", f"-I{CSRC}",
        *[word for system in systems for word in ("-isystem", str(system))],
    ]  # fmt: skip


def path(name: Path) -> str:
    """A path in a ninja build line."""
    return re.sub(r"([$ :])", r"$\1", str(name))


def shell(words: list[str]) -> str:
    """Words of a command in a ninja rule."""
    return shlex.join(words).replace("$", "$$")


def ninja_file(target: Path, sources: list[Path], instrument: list[str], link: list[str]) -> str:
    compiler = (os.environ.get("CXX") or "g++").replace("$", "$$")
    lines = [
        "ninja_required_version = 1.3",
        f"rule cxx\n  command = rm -f $counts && {compiler} {shell(flags(instrument))} -MMD -MF $out.d"
        " -x c++ -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = EMULATE $out",
        f"rule link\n  command = {compiler} $in -o $out {shell([*instrument, *link])}\n  description = LINK $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source.relative_to(ROOT)}.o".replace("/", "-"))
        counts = objects[-1].removesuffix("o") + "gcda"  # the counts of the code that was there before
        lines.append(f"build {objects[-1]}: cxx {path(source)}\n  counts = {counts}")
    lines.append(f"build {path(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compiled(folder: str, name: str, sources: list[Path], instrument: list[str], link: list[str]) -> Path:
    """The path of an up-to-date file in build/<folder>; compiles what changed."""
    here = ROOT / "build" / folder
    here.mkdir(parents=True, exist_ok=True)
    target = here / name
    text = ninja_file(target, sources, instrument, link)
    file = here / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    run = subprocess.run([sys.executable, "-m", "ninja", "-C", str(here)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"building the emulator failed:\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}")
    return target


def sanitizing() -> bool:
    return os.environ.get("TOKENPRUNE_EMULATOR_SANITIZE") == "1"


# Addresses outside of what is there, and those that are no multiple of what is loaded at once, where a GPU stops and
# the host does not. Instrumented code confuses the compiler's own search for uninitialised values.
ADDRESSES = [
    "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer",
    "-Wno-maybe-uninitialized",
]  # fmt: skip


def build() -> Path:
    """The extension module with the kernels of csrc/cuda."""
    instrument = ADDRESSES if sanitizing() else ["--coverage"]
    link = ["-shared", f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-ldl"]
    return compiled(
        "emulator-asan" if sanitizing() else "emulator", f"_emulator{MODULE}", [*RUNTIME, *PROJECT], instrument, link
    )


def build_broken() -> Path:
    """The extension module with the kernels of broken/."""
    sources = [*RUNTIME, BROKEN / "kernels.cu", BROKEN / "module.cpp"]
    return compiled("emulator-broken", f"_broken{MODULE}", sources, [], ["-shared", "-ldl"])


def build_broken_program() -> Path:
    """The executable with the kernels of broken/, under AddressSanitizer."""
    sources = [*RUNTIME, BROKEN / "kernels.cu", BROKEN / "main.cpp"]
    return compiled("emulator-broken-asan", "broken", sources, ADDRESSES, ["-rdynamic", "-ldl"])
