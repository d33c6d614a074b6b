"""Registers, shared memory and matrix instructions of every Triton kernel, compiled for GPUs that are not here.

    python -m scripts.triton_resources            compiles the kernels and compares with tests/triton/resources.csv
    python -m scripts.triton_resources --write    writes that table (make triton-table)

A row is a kernel on a target, with the worst of its specialisations. The table is a budget: a kernel may use less than
it says, not more. Registers and shared memory depend on the compiler, so that the table names the Triton it comes from,
and holds for that one only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from testing import ROOT
from testing.triton_compile.results import TARGETS, Result, complaints

TABLE = ROOT / "tests" / "triton" / "resources.csv"
REFRESH = "make triton-table writes the table anew: look at its diff"
HEADER = "kernel,target,specialisations,registers,shared,local,matrix"


class Kernel(NamedTuple):
    name: str
    target: str


class Usage(NamedTuple):
    """The largest over all specialisations of a kernel."""

    specialisations: int
    registers: int  # of a thread, at most
    shared: int  # bytes, at most
    local: int  # bytes of a thread's values in memory, at most: spilled registers
    matrix: str  # the kinds of matrix instructions in them


Table = dict[Kernel, Usage]


class Compiled(NamedTuple):
    """What `python -m testing.triton_compile` wrote down."""

    report: dict[str, Any]
    results: list[Result]
    status: int  # 1 after complaints

    @property
    def version(self) -> str:
        return str(self.report["triton"])


def compile_kernels(*arguments: str) -> Compiled:
    """In a process of its own, because Triton must not be in its interpreted mode there. Prints its progress."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "report.json")
        command = [sys.executable, "-m", "testing.triton_compile", "--output", str(output), *arguments]
        done = subprocess.run(command, cwd=ROOT)
        if not output.exists():
            raise RuntimeError(f"{' '.join(command)} ended with exit status {done.returncode} and without results")
        report = json.loads(output.read_text())
    return Compiled(report, [Result(**r) for r in report.pop("results")], done.returncode)


def summary(results: Iterable[Result]) -> Table:
    table: Table = {}
    for r in results:
        kernel = Kernel(r.kernel, r.target)
        before = table.get(kernel, Usage(0, 0, 0, 0, ""))
        kinds = sorted({*before.matrix.split("+"), r.matrix} - {""})
        table[kernel] = Usage(
            before.specialisations + 1,
            max(before.registers, r.registers),
            max(before.shared, r.shared),
            max(before.local, r.local),
            "+".join(kinds),
        )
    return table


def by_name(item: tuple[Kernel, Usage]) -> tuple[str, int]:
    return item[0].name, TARGETS.index(item[0].target)


def table_text(version: str, table: Table) -> str:
    rows = [",".join(map(str, (*kernel, *usage))) for kernel, usage in sorted(table.items(), key=by_name)]
    return "\n".join([f"# triton {version}; {REFRESH}", HEADER, *rows]) + "\n"


def read_table(text: str) -> tuple[str, Table]:
    """The version of Triton and the budget."""
    comment, _, *rows = text.splitlines()
    table: Table = {}
    for row in rows:
        name, target, *numbers, matrix = row.split(",")
        table[Kernel(name, target)] = Usage(*map(int, numbers), matrix)
    return comment.removeprefix("# triton ").partition(";")[0], table


def label(kernel: Kernel) -> str:
    return f"{kernel.name} for {kernel.target}"


def unlisted(got: Table, budget: Table) -> Iterator[str]:
    """Kernels that only one of the two knows."""
    for kernel in sorted(got.keys() ^ budget.keys()):
        yield f"{label(kernel)} is only in {'the code' if kernel in got else 'the table'}"


def excesses(got: Table, budget: Table) -> Iterator[str]:
    """Where kernels are not what the table says; both from the same version of Triton."""
    for kernel, usage in sorted(got.items(), key=by_name):
        allowed = budget.get(kernel)
        if allowed is None:
            continue
        if usage.registers > allowed.registers:
            yield f"{label(kernel)}: {usage.registers} registers, the table allows {allowed.registers}"
        if usage.shared > allowed.shared:
            yield f"{label(kernel)}: {usage.shared} bytes of shared memory, the table allows {allowed.shared}"
        if usage.local > allowed.local:
            yield f"{label(kernel)}: {usage.local} bytes of local memory, the table allows {allowed.local}"
        for what in ("specialisations", "matrix"):
            if getattr(usage, what) != getattr(allowed, what):
                yield f"{label(kernel)}: {what} {getattr(usage, what)}, the table says {getattr(allowed, what)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    arguments = parser.parse_args()
    compiled = compile_kernels()
    got, good = summary(compiled.results), not complaints(compiled.results)  # which were printed there
    if arguments.write:
        if good:
            TABLE.write_text(table_text(compiled.version, got))
            print(f"{TABLE.relative_to(ROOT)}: {len(got)} rows")
        return 0 if good else 1
    version, budget = read_table(TABLE.read_text())
    wrong = list(unlisted(got, budget))
    if version == compiled.version:
        wrong += excesses(got, budget)
    else:
        print(f"the table is of triton {version}, this is triton {compiled.version}: no numbers compared")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 0 if good and not wrong else 1


if __name__ == "__main__":
    raise SystemExit(main())
