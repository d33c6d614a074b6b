"""The CUDA kernels of the build in place: their names, where their machine code lies, and which nvcc made it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from testing import ROOT

OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cuda"
REFRESH = "make cuda-table writes the tables anew: look at their diff"


class Kernel(NamedTuple):
    """One instantiation for one architecture."""

    family: str  # of csrc/cuda/<family>.cu
    name: str
    architecture: str


def short_name(demangled: str) -> str:
    """`void tokenprune::f<float, 2>(tokenprune::P)` -> `f<float, 2>`."""
    name = demangled.replace("(anonymous namespace)::", "").replace("tokenprune::", "").removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def demangle(names: list[str]) -> list[str]:
    """The short names of mangled ones; c++filt comes with the linker that the build needs."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in plain.splitlines()]


def families() -> list[str]:
    return sorted(source.stem for source in (ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc() -> str | None:
    """The nvcc that setup.py takes, or None without one."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def nvcc_version() -> str | None:
    """Its version, or None without one."""
    command = nvcc()
    if command is None:
        return None
    told = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\bV(\d+\.\d+\.\d+)", told)
    return version[1] if version else None


def order(kernel: Kernel) -> tuple[str, str, int]:
    """By family, name and the number of the architecture."""
    return kernel.family, kernel.name, int(re.sub(r"\D", "", kernel.architecture))


def label(kernel: Kernel) -> str:
    return f"{kernel.family}.cu: {kernel.name} for {kernel.architecture}"


def compared(build: Collection[Kernel], table: Collection[Kernel]) -> set[str]:
    """The architectures that were built and are in the table."""
    return {kernel.architecture for kernel in build} & {kernel.architecture for kernel in table}


def unlisted(build: Collection[Kernel], table: Collection[Kernel]) -> Iterator[str]:
    """Kernels that only one of the two knows, on the architectures that both know."""
    common = compared(build, table)
    for kernel in sorted({*build} ^ {*table}):
        if kernel.architecture in common:
            yield f"{label(kernel)} is only in {'the build' if kernel in build else 'the table'}"
