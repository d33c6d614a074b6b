"""What the machine code of every CUDA kernel costs: issue slots, branches, fences and barriers of its loops.

    python -m scripts.cuda_costs               compares the last build in place with tests/cuda/costs.csv and the limits
    python -m scripts.cuda_costs --write       writes that table from it (make cuda-table builds and writes)
    python -m scripts.cuda_costs --tighten     lowers tests/cuda/limits.csv to what that table has; new kernels come in
    python -m scripts.cuda_costs --loosen X    raises the limit of the kernels whose names begin with X to it
    python -m scripts.cuda_costs --loops       prints every loop

All take object files or cubins instead of the build: `python -m scripts.cuda_costs --loops attention_rows.cubin`.
The table says what there is, so that a change is seen in review; the limits say what may be, and are raised by hand.
docs/kernels.md says how to read both, scripts/machine_code.py how an iteration is found.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from testing import ROOT
from testing.cuda_costs import TABLE, Cost, Table, read_table, table_text
from testing.cuda_kernels import OBJECTS, Kernel, demangle, families, label, nvcc_version, order, unlisted

from . import machine_code as code

LIMITS = ROOT / "tests" / "cuda" / "limits.csv"
ARCHITECTURE = "sm_90a"


class LoopCost(NamedTuple):
    """One iteration, the heaviest if nothing else is said; what inner loops cost is theirs."""

    depth: int
    line: str  # of the source
    slots: int = 0  # instructions that a warp issues at most,
    least: int = 0  # and at least
    matrix: int = 0  # of them on tensor cores
    loads: int = 0  # of them from global memory
    loaded: int = 0  # bytes, of one thread
    moved: int = 0  # bytes loaded and stored
    special: int = 0  # MUFU: exponentials, reciprocals, roots
    split: int = 0  # MUFU with a branch between it and the one before: they do not overlap
    fences: int = 0  # GPU-wide or wider, on all ways through the loop
    barriers: int = 0  # of the block or the cluster, on all ways through the loop
    nest: int = 0  # slots at most, with those of the inner loops that it goes through, once each
    nest_least: int = 0


class Limit(NamedTuple):
    """What kernels whose names begin alike may cost."""

    instructions: int
    per_unit: float
    per_unit_least: float
    split: int
    fences: int
    barriers: int
    trips: int  # of the hot loop in the one around it, for per_unit: attention at D = 128 has two chunks a tile


def count(instructions: Iterable[code.Instruction], pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.match(instruction.text)) for instruction in instructions)


def splits(instructions: Iterable[code.Instruction]) -> int:
    """How often a branch stands between one special-function instruction and the next."""
    found, seen, branched = 0, False, False
    for instruction in instructions:
        if code.SPECIAL.match(instruction.text):
            found += seen and branched
            seen, branched = True, False
        branched |= bool(code.BRANCH.match(instruction.text))
    return found


def loop_cost(function: code.Function, loop: code.Loop, depth: int) -> LoopCost:
    path = function.instructions(loop.most)
    own = function.instructions(sorted(loop.blocks.difference(*(inner.blocks for inner in loop.inner))))
    loads = [i.global_bytes for i in path if code.GLOBAL_LOAD.match(i.text)]
    # A header of the toolkit is a .hpp or has no ending.
    line = next((i.line for i in path if re.search(r"\.(cuh?|h):", i.line)), "")
    return LoopCost(
        depth,
        line,
        len(path),
        len(function.instructions(loop.least)),
        count(path, code.MATRIX),
        len(loads),
        sum(loads),
        sum(i.global_bytes for i in path),
        count(path, code.SPECIAL),
        splits(path),
        count(own, code.FENCE),
        count(own, code.BARRIER),
        len(function.instructions(code.all_blocks(loop, 1))),
        len(function.instructions(code.all_blocks(loop, -1))),
    )


def summed(function: code.Function, loops: list[LoopCost]) -> Cost:
    """The row of a kernel, from its loops in the order of `code.nests`."""
    everything = function.instructions(range(len(function.blocks)))
    instructions = sum(i.text != "NOP" for i in everything)
    if not loops:
        return Cost(instructions)

    def within(i: int) -> list[LoopCost]:
        """A loop and everything in it."""
        end = next((j for j in range(i + 1, len(loops)) if loops[j].depth <= loops[i].depth), len(loops))
        return loops[i:end]

    def outer(i: int, depth: int) -> int:
        """The loop of that depth around another."""
        return max(j for j in range(i + 1) if loops[j].depth == depth)

    def heat(i: int) -> tuple[int, bool, bool, int, int]:
        waits = any(loop.barriers for loop in within(outer(i, 0)))
        return loops[i].matrix, len(within(i)) == 1, waits, loops[i].moved, loops[i].slots

    hot = max(range(len(loops)), key=heat)
    parent = outer(hot, max(loops[hot].depth - 1, 0))
    return Cost(
        instructions,
        loops[hot].slots,
        loops[hot].least,
        loops[hot].matrix,
        loops[hot].moved,
        round(loops[hot].loaded / loops[hot].loads) if loops[hot].loads else 0,
        loops[parent].nest - loops[hot].slots,
        loops[parent].nest_least - loops[hot].least,
        loops[outer(hot, 0)].nest,
        loops[outer(hot, 0)].nest_least,
        sum(loop.split for loop in loops),
        sum(loop.fences for loop in loops),
        sum(loop.barriers for loop in loops),
    )


def read_file(file: Path, architecture: str) -> dict[Kernel, tuple[Cost, list[LoopCost]]]:
    """The kernels of a file, whose family is its name as far as the first dot."""
    functions = list(code.functions(code.disassemble(file, architecture)))
    found = {}
    for name, function in zip(demangle([f.name for f in functions]), functions, strict=True):
        loops = [loop_cost(function, loop, depth) for depth, loop in code.nests(function.loops)]
        found[Kernel(file.name.split(".")[0], name, architecture)] = summed(function, loops), loops
    return found


def differences(build: Table, table: Table) -> Iterator[str]:
    yield from unlisted(build, table)
    for kernel in sorted({*build} & {*table}, key=order):
        for name, now, said in zip(Cost._fields, build[kernel], table[kernel], strict=True):
            if now != said:
                yield f"{label(kernel)}: {name} is {now}, the table says {said}"


def read_limits(text: str) -> dict[str, Limit]:
    """The limits by how names of kernels begin."""
    rows = list(csv.reader(text.splitlines()[1:]))
    return {row[-1]: Limit(int(row[0]), float(row[1]), float(row[2]), *map(int, row[3:-1])) for row in rows}


def limits_text(limits: Mapping[str, Limit]) -> str:
    rows = [",".join((*(f"{number:g}" for number in limit), name)) for name, limit in limits.items()]
    return "\n".join([",".join((*Limit._fields, "kernel")), *rows]) + "\n"


def limited(limits: Iterable[str], table: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    """The kernels that each limit is for."""
    kernels = list(table)
    return {name: [kernel for kernel in kernels if kernel.name.startswith(name)] for name in limits}


def excesses(table: Table, limits: Mapping[str, Limit]) -> Iterator[str]:
    """Kernels above their limit, kernels without one, and limits without a kernel."""
    groups = limited(limits, table)
    for kernel in sorted(table, key=order):
        if not any(kernel in group for group in groups.values()):
            yield f"{label(kernel)} has no limit in {LIMITS.relative_to(ROOT)}"
    for begin, limit in limits.items():
        if not groups[begin]:
            yield f"{LIMITS.relative_to(ROOT)}: no kernel's name begins with {begin}"
        for kernel in groups[begin]:
            costs = table[kernel]._asdict()
            costs |= {"per_unit": round(table[kernel].per_unit(limit.trips), 1)}
            costs |= {"per_unit_least": round(table[kernel].per_unit(limit.trips, least=True), 1)}
            for name in Limit._fields[:-1]:
                if costs[name] > getattr(limit, name):
                    yield f"{label(kernel)}: {name} is {costs[name]}, the limit of {begin} is {getattr(limit, name):g}"


def rounded_up(number: float) -> float:
    """To two digits, so that a few instructions more are no excess."""
    unit = 10 ** max(math.floor(math.log10(number)) - 1, 0) if number >= 1 else 1
    return math.ceil(number / unit) * unit


def needed(costs: Iterable[Cost], trips: int) -> Limit:
    """The limit that kernels with these costs keep."""
    every = list(costs)
    return Limit(
        int(max(rounded_up(cost.instructions) for cost in every)),
        max(rounded_up(cost.per_unit(trips)) for cost in every),
        max(rounded_up(cost.per_unit(trips, least=True)) for cost in every),
        max(cost.split for cost in every),
        max(cost.fences for cost in every),
        max(cost.barriers for cost in every),
        trips,
    )


def tightened(table: Table, limits: Mapping[str, Limit]) -> dict[str, Limit]:
    """The limits, lowered to what their kernels have; those without a kernel go, kernels without one get theirs."""
    groups = limited(limits, table)
    listed = {kernel for kernels in groups.values() for kernel in kernels}
    new = sorted({re.sub(r"<.*", "<", kernel.name) for kernel in table if kernel not in listed})
    lower = {}
    for begin, kernels in limited([*limits, *new], table).items():
        old = limits.get(begin)
        if kernels:
            most = needed((table[kernel] for kernel in kernels), old.trips if old else 1)
            lower[begin] = Limit(*map(min, old, most)) if old else most
    return lower


def described(kernel: Kernel, found: Cost, loops: list[LoopCost]) -> Iterator[str]:
    """The lines that show one kernel."""
    yield f"{label(kernel)}: {found.instructions} instructions"
    if loops:
        yield f"  {'loop at':36} slots least matrix  per matrix  per 16 B  MUFU  split  bytes/load  fences  barriers"
    for loop in loops:
        yield (
            f"  {'  ' * loop.depth + loop.line:36} {loop.slots:5} {loop.least:5} {loop.matrix:6} "
            f"{loop.slots / max(loop.matrix, 1) if loop.matrix else 0:11.1f} "
            f"{16 * loop.slots / loop.moved if loop.moved else 0:9.1f} {loop.special:5} {loop.split:6} "
            f"{loop.loaded / max(loop.loads, 1):11.1f} {loop.fences:7} {loop.barriers:9}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="object files or cubins")
    parser.add_argument("--architecture", default=ARCHITECTURE, help="with --loops; the table is that of %(default)s")
    parser.add_argument("--kernel", default="", help="with --loops: kernels whose names contain this")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    what.add_argument("--tighten", action="store_true", help=f"lower {LIMITS.relative_to(ROOT)} to the table")
    what.add_argument("--loosen", metavar="X", help=f"raise the limit {LIMITS.relative_to(ROOT)} has of X to the table")
    what.add_argument("--loops", action="store_true", help="print every loop")
    arguments = parser.parse_args()
    limits = read_limits(LIMITS.read_text())
    if arguments.tighten or arguments.loosen:
        _, table = read_table(TABLE.read_text())
    if arguments.tighten:
        LIMITS.write_text(limits_text(tightened(table, limits)))
        return 0
    if arguments.loosen:
        group = [table[kernel] for kernel in limited([arguments.loosen], table)[arguments.loosen]]
        if arguments.loosen not in limits or not group:
            raise SystemExit(f"{LIMITS.relative_to(ROOT)} and the table have no {arguments.loosen} both")
        old = limits[arguments.loosen]
        LIMITS.write_text(limits_text(limits | {arguments.loosen: Limit(*map(max, old, needed(group, old.trips)))}))
        return 0

    build: Table = {}
    for file in arguments.files or [OBJECTS / f"{family}.cu.o" for family in families()]:
        if not file.exists():
            raise SystemExit(f"{file} is not there: make build, or name another object file or cubin")
        for kernel, (found, loops) in read_file(file, arguments.architecture).items():
            build[kernel] = found
            if arguments.loops and arguments.kernel in kernel.name:
                print(*described(kernel, found, loops), sep="\n")
    if arguments.loops:
        return 0
    if arguments.write:
        TABLE.write_text(table_text(str(nvcc_version()), build))
        print(f"{TABLE.relative_to(ROOT)}: {len(build)} kernels")
        complaints = list(excesses(build, limits))
    else:
        version, table = read_table(TABLE.read_text())
        if nvcc_version() != version:
            raise SystemExit(f"the table is that of nvcc {version}; this is nvcc {nvcc_version()}")
        complaints = [*differences(build, table), *excesses(build, limits)]
    print("\n".join(complaints), end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
