"""`python -m bench.gpu_suite.predictions`: the floor of every row, the time that its machine code predicts, what binds.

With `--write` the figures go into the table of docs/kernels.md, whose other columns are written by hand. Nothing here
is a measurement: rates are assumed (floors.py), and what the kernels do is counted in their machine code (model.py).
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from torch._subclasses.fake_tensor import DataDependentOutputException

from bench.rows import Scale, gpu_rows, short
from testing import ROOT, pages
from tokenprune_kernels._backend import lacks

from . import model
from .floors import ASSUMED, floor_seconds

PAGE = ROOT / "docs" / "kernels.md"
SECTION = "predictions"
HEADER = ["| op | launches | row | predicted, us | floor, us | what binds | what was tried |", "|---" * 7 + "|"]


class Figures(NamedTuple):
    """Of a row; seconds."""

    floor: float | None  # None for a row without one
    least: float  # predicted
    most: float
    binds: str


def figures() -> Iterator[tuple[str, Figures]]:
    for row in gpu_rows(Scale(toy=False)):
        if any(lacks("cuda", op) for op in row.ops):
            continue  # there is no machine code to count
        floor = floor_seconds(row.bytes, row.flops, short(row.dtype), ASSUMED) if row.bytes else None
        try:
            calls = model.calls_of(row)
        except DataDependentOutputException:
            continue  # a packed batch: on a CPU, which the calls are seen on, the values of cu_seqlens are looked at
        parts, least = model.predicted(calls), sum(model.predicted(calls, least=True).values())
        yield row.name, Figures(floor, least, sum(parts.values()), max(parts, key=lambda name: parts[name]))


def microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.{0 if seconds >= 1e-4 else 2}f}"


def span(least: float, most: float) -> str:
    return microseconds(most) if most < 1.02 * least else f"{microseconds(least)} to {microseconds(most)}"


class Line(NamedTuple):
    """Of the table on the page. A line without a row has no figures."""

    op: str  # and, behind a comma, which calls of it
    launches: int  # at most, for every shape
    row: str
    predicted: str
    floor: str
    binds: str
    tried: str


def read_page(text: str) -> list[Line]:
    lines = pages.section(text, SECTION).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Line(op.replace("`", ""), int(launches), *rest) for op, launches, *rest in cells]


def refreshed(text: str, found: dict[str, Figures]) -> str:
    """The page with these figures; every row of an op that has a line has one, or an error says which has none."""
    lines = read_page(text)
    unknown = {line.row for line in lines if line.row} ^ {name for name, of in found.items() if of.floor is not None}
    if unknown:
        raise SystemExit(f"{PAGE.relative_to(ROOT)}: rows of the page or of the suite alone: {sorted(unknown)}")
    written = []
    for line in lines:
        if line.row:
            of = found[line.row]
            predicted = span(of.least, of.most)
            line = line._replace(predicted=predicted, floor=microseconds(of.floor), binds=of.binds)
        name, *which = line.op.split(", ", 1)
        cells = (", ".join([f"`{name}`", *which]), *line[1:])
        written.append(" ".join(["|", *(f"{cell} |" if cell != "" else "|" for cell in cells)]))
    return pages.fill(text, SECTION, "\n".join([*HEADER, *written]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the figures into {PAGE.relative_to(ROOT)}")
    found = dict(figures())
    if parser.parse_args().write:
        PAGE.write_text(refreshed(PAGE.read_text(), found))
        return
    print("| row | floor with one launch, us | predicted, us | what binds |", "|" + "---|" * 4, sep="\n")
    for name, of in found.items():
        print(f"| {name} | {microseconds(of.floor)} | {span(of.least, of.most)} | {of.binds} |")


if __name__ == "__main__":
    main()
