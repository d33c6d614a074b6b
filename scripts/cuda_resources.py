"""Registers, shared memory and spills of every CUDA kernel, as ptxas reported them to the build.

    python -m scripts.cuda_resources            compares the last build in place with tests/cuda/resources.csv
    python -m scripts.cuda_resources --write    writes that table from it (make cuda-table builds and writes)

The table is a budget: a kernel may use less than it says, not more. How many registers a kernel takes depends on the
compiler, so that the table names the nvcc it comes from, and holds for that one only.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from testing import ROOT
from testing.cuda_kernels import OBJECTS, REFRESH, Kernel, demangle, families, label, nvcc_version, order, unlisted

TABLE = ROOT / "tests" / "cuda" / "resources.csv"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")


class Usage(NamedTuple):
    registers: int
    shared: int  # bytes of static shared memory
    spilled: int = 0  # bytes of spill stores and loads
    stack: int = 0  # bytes: spills, and local arrays that are indexed at run time


Build = dict[Kernel, Usage]


def read_log(family: str, text: str, names_of: Callable[[list[str]], list[str]] = demangle) -> Build:
    """The kernels that a log of ptxas -v speaks of; functions that were not inlined count towards their kernel."""
    found: list[tuple[str, str]] = []
    usages: list[Usage] = []
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            found.append((entry[1], entry[2]))
            usages.append(Usage(0, 0))
        elif memory := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, memory.groups())
            before = usages[-1]
            usages[-1] = before._replace(spilled=before.spilled + stores + loads, stack=before.stack + stack)
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            usages[-1] = usages[-1]._replace(registers=int(used[1]), shared=int(shared[1]) if shared else 0)
    names = names_of([mangled for mangled, _ in found])
    kernels = [Kernel(family, name, arch) for name, (_, arch) in zip(names, found, strict=True)]
    return dict(zip(kernels, usages, strict=True))


def read_build(folder: Path = OBJECTS) -> Build:
    """What ptxas said of every .cu file; FileNotFoundError for one that was not built."""
    build: Build = {}
    for family in families():
        build |= read_log(family, (folder / f"{family}.cu.o.log").read_text())
    return build


def table_text(version: str, build: Build) -> str:
    lines = [f"# nvcc {version}; {REFRESH}", "family,architecture,registers,shared,kernel"]
    for kernel in sorted(build, key=order):
        usage = build[kernel]
        lines.append(f"{kernel.family},{kernel.architecture},{usage.registers},{usage.shared},{kernel.name}")
    return "\n".join(lines) + "\n"


def read_table(text: str) -> tuple[str, Build]:
    """The nvcc version and the budget."""
    comment, _, *rows = text.splitlines()
    budget: Build = {}
    for row in rows:
        family, architecture, registers, shared, name = row.split(",", 4)
        budget[Kernel(family, name, architecture)] = Usage(int(registers), int(shared))
    version = re.match(r"# nvcc ([\d.]+)", comment)
    assert version is not None, comment
    return version[1], budget


def spills(build: Build) -> Iterator[str]:
    for kernel in sorted(build, key=order):
        usage = build[kernel]
        if usage.spilled:
            yield f"{label(kernel)} spills {usage.spilled} bytes"
        elif usage.stack:
            yield f"{label(kernel)} keeps {usage.stack} bytes of local variables in memory"


def excesses(build: Build, budget: Build) -> Iterator[str]:
    for kernel in sorted(build, key=order):
        usage = build[kernel]
        allowed = budget.get(kernel)
        if allowed is None:
            continue
        if usage.registers > allowed.registers:
            yield f"{label(kernel)}: {usage.registers} registers, the table allows {allowed.registers}"
        if usage.shared != allowed.shared:
            yield f"{label(kernel)}: {usage.shared} bytes of shared memory, the table says {allowed.shared}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    arguments = parser.parse_args()
    try:
        build = read_build()
    except FileNotFoundError as missing:
        raise SystemExit(f"no build with CUDA kernels in place: {missing}") from None
    complaints: Iterable[str]
    if arguments.write:
        wanted = {(family, architecture) for family in families() for architecture in ARCHITECTURES}
        absent = sorted(wanted - {(kernel.family, kernel.architecture) for kernel in build})
        if absent:
            raise SystemExit(f"not built: {', '.join(f'{family}.cu for {a}' for family, a in absent)}")
        complaints = list(spills(build))
        if not complaints:
            TABLE.write_text(table_text(str(nvcc_version()), build))
            print(f"{TABLE.relative_to(ROOT)}: {len(build)} kernels")
    else:
        _, budget = read_table(TABLE.read_text())
        complaints = [*spills(build), *unlisted(build, budget), *excesses(build, budget)]
    print("\n".join(complaints), end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
