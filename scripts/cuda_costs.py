"""What the machine code of every CUDA kernel costs: issue slots, branches, fences and barriers of its loops.

    python -m scripts.cuda_costs              prints the loops of the last build in place
    python -m scripts.cuda_costs FILE ...     those of object files or cubins

docs/kernels.md says how to read it, scripts/machine_code.py how an iteration is found.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import machine_code as code
from .cuda_kernels import OBJECTS, Kernel, demangle, families, label

ARCHITECTURE = "sm_90a"


class LoopCost(NamedTuple):
    """One iteration; what inner loops cost is theirs."""

    depth: int
    line: str  # of the source
    innermost: bool
    slots: int  # instructions that a warp issues
    matrix: int  # of them on tensor cores
    loads: int  # of them from global memory
    loaded: int  # bytes, of one thread
    moved: int  # bytes loaded and stored
    special: int  # MUFU: exponentials, reciprocals, roots
    split: int  # MUFU with a branch between it and the one before: they do not overlap
    fences: int  # GPU-wide or wider, in all branches of the loop
    barriers: int  # of the block or the cluster, in all branches of the loop

    @property
    def slots_per_matrix(self) -> float:
        return self.slots / self.matrix if self.matrix else 0.0

    @property
    def slots_per_16_bytes(self) -> float:
        return 16 * self.slots / self.moved if self.moved else 0.0

    @property
    def bytes_per_load(self) -> float:
        return self.loaded / self.loads if self.loads else 0.0


class Cost(NamedTuple):
    instructions: int  # of the kernel, without padding
    loops: tuple[LoopCost, ...]  # an outer one before its inner ones


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
    path = function.instructions(loop.path)
    own = function.instructions(sorted(loop.blocks.difference(*(inner.blocks for inner in loop.inner))))
    loads = [i.global_bytes for i in path if code.GLOBAL_LOAD.match(i.text)]
    return LoopCost(
        depth,
        function.blocks[loop.header].instructions[0].line,
        not loop.inner,
        len(path),
        count(path, code.MATRIX),
        len(loads),
        sum(loads),
        sum(i.global_bytes for i in path),
        count(path, code.SPECIAL),
        splits(path),
        count(own, code.FENCE),
        count(own, code.BARRIER),
    )


def cost(function: code.Function) -> Cost:
    everything = function.instructions(range(len(function.blocks)))
    loops = tuple(loop_cost(function, loop, depth) for depth, loop in code.nests(function.loops))
    return Cost(sum(i.text != "NOP" for i in everything), loops)


def read_file(file: Path, family: str, architecture: str = ARCHITECTURE) -> dict[Kernel, Cost]:
    functions = list(code.functions(code.disassemble(file, architecture)))
    names = demangle([function.name for function in functions])
    return {Kernel(family, name, architecture): cost(f) for name, f in zip(names, functions, strict=True)}


HEADER = f"  {'loop at':36} slots matrix  per matrix  per 16 B  MUFU  split  bytes/load  fences  barriers"


def described(kernel: Kernel, found: Cost) -> Iterator[str]:
    """The lines that show one kernel."""
    yield f"{label(kernel)}: {found.instructions} instructions"
    if found.loops:
        yield HEADER
    for loop in found.loops:
        yield (
            f"  {'  ' * loop.depth + loop.line:36} {loop.slots:5} {loop.matrix:6} {loop.slots_per_matrix:11.1f} "
            f"{loop.slots_per_16_bytes:9.1f} {loop.special:5} {loop.split:6} {loop.bytes_per_load:11.1f} "
            f"{loop.fences:7} {loop.barriers:9}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="object files or cubins")
    parser.add_argument("--architecture", default=ARCHITECTURE)
    parser.add_argument("--kernel", default="", help="only kernels whose names contain this")
    arguments = parser.parse_args()
    for file in arguments.files or [OBJECTS / f"{family}.cu.o" for family in families()]:
        if not file.exists():
            raise SystemExit(f"{file} is not there: make build, or name another object file or cubin")
        for kernel, found in read_file(file, file.name.split(".")[0], arguments.architecture).items():
            if arguments.kernel in kernel.name:
                print(*described(kernel, found), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
