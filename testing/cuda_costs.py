"""tests/cuda/costs.csv: what the hot loop of every CUDA kernel costs. scripts/cuda_costs.py makes it and says how."""

import re
from typing import NamedTuple

from testing import ROOT
from testing.cuda_kernels import REFRESH, Kernel, order

TABLE = ROOT / "tests" / "cuda" / "costs.csv"


class Cost(NamedTuple):
    """A row of the table. The hot loop has the most matrix instructions; without any, it is the innermost one that
    moves the most bytes, in a loop with a barrier if there is one."""

    instructions: int  # of the kernel, without padding
    slots: int = 0  # of the hot loop, at most
    least: int = 0  # at least
    matrix: int = 0
    moved: int = 0  # bytes between a thread and global memory
    load_bytes: int = 0  # of one load from global memory, on average
    around: int = 0  # slots of the loop around it: its own and, once each, those of its other inner loops
    around_least: int = 0
    nest: int = 0  # slots of the outermost loop around it, inner loops once each, the hot one too
    nest_least: int = 0
    split: int = 0  # MUFU behind a branch, in all loops
    fences: int = 0  # in all loops
    barriers: int = 0  # in all loops

    def per_unit(self, trips: int = 1, least: bool = False) -> float:
        """Slots per matrix instruction, or per 16 bytes moved, when the loop around runs the hot one so many times."""
        units = self.matrix or self.moved / 16
        slots, around = (self.least, self.around_least) if least else (self.slots, self.around)
        return (slots + around / trips) / units if units else 0.0


Table = dict[Kernel, Cost]


def table_text(version: str, table: Table) -> str:
    lines = [f"# nvcc {version}; {REFRESH}", ",".join(("family", "architecture", *Cost._fields, "kernel"))]
    for kernel in sorted(table, key=order):
        lines.append(",".join((kernel.family, kernel.architecture, *map(str, table[kernel]), kernel.name)))
    return "\n".join(lines) + "\n"


def read_table(text: str) -> tuple[str, Table]:
    """The nvcc version and the costs."""
    comment, _, *rows = text.splitlines()
    version = re.match(r"# nvcc ([\d.]+)", comment)
    assert version is not None, comment
    table = {}
    for row in rows:
        family, architecture, *numbers, name = row.split(",", len(Cost._fields) + 2)
        table[Kernel(family, name, architecture)] = Cost(*map(int, numbers))
    return version[1], table
