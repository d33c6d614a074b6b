"""Compiles the CUDA kernels and their bindings with g++ against the emulator's headers, with ninja.

TOKENPRUNE_EMULATOR_SANITIZE=1 builds with AddressSanitizer, in a folder of its own.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
SOURCES = [*sorted(HERE.glob("*.cpp")), *sorted((CSRC / "cuda").glob("*.c*")), CSRC / "tensor.cpp"]


def folder() -> Path:
    return ROOT / "build" / ("emulator-asan" if os.environ.get("TOKENPRUNE_EMULATOR_SANITIZE") == "1" else "emulator")


def flags() -> list[str]:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent / "include"
    sanitize = os.environ.get("TOKENPRUNE_EMULATOR_SANITIZE") == "1"
    systems = [torch, sysconfig.get_path("include"), pybind11.get_include()]
    return [
        "-std=c++17", "-fPIC", "-g1", "-O1", "-ffp-contract=off", "-mavx2", "-mfma", "-mf16c",
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes",
        *(["-fsanitize=address", "-fno-omit-frame-pointer"] if sanitize else ["--coverage"]),
        "-DTOKENPRUNE_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{HERE / 'include'}", f"-I{CSRC / 'include'}", f"-I{CSRC}",
        *[word for system in systems for word in ("-isystem", str(system))],
    ]  # fmt: skip


def ninja_file(target: Path) -> str:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    compiler = os.environ.get("CXX") or "g++"
    sanitize = os.environ.get("TOKENPRUNE_EMULATOR_SANITIZE") == "1"
    link = ["-shared", f"-L{Path(spec.origin).parent / 'lib'}", "-ltorch_cpu", "-ldl"]
    link += ["-fsanitize=address"] if sanitize else ["--coverage"]
    lines = [
        "ninja_required_version = 1.3",
        f"rule cxx\n  command = rm -f $counts && {compiler} {shlex.join(flags())} -MMD -MF $out.d"
        " -x c++ -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = EMULATE $out",
        f"rule link\n  command = {compiler} $in -o $out {shlex.join(link)}\n  description = LINK $out",
    ]
    objects = []
    for source in SOURCES:
        objects.append(f"{source.relative_to(ROOT)}.o".replace("/", "-"))
        counts = objects[-1].removesuffix("o") + "gcda"  # the counts of the code that was there before
        lines.append(f"build {objects[-1]}: cxx {source}\n  counts = {counts}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build() -> Path:
    """The path of the up-to-date extension module; compiles what changed."""
    here = folder()
    here.mkdir(parents=True, exist_ok=True)
    target = here / f"_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    text = ninja_file(target)
    file = here / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    run = subprocess.run([sys.executable, "-m", "ninja", "-C", str(here)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"building the emulator failed:\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}")
    return target
