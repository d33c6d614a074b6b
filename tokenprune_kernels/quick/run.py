"""The command: time the rows, print the table, draw the bars."""

import argparse
import importlib.util
import sys

from .._command import CommandError, device_of, file_to_write
from .race import race
from .report import caption, draw, heading, table
from .rows import rows

SECONDS = 3.0  # of each row; what it replaces may take longer


def run(options: argparse.Namespace) -> int:
    """The command `bench`; its status is 1 when a result was wrong."""
    if not options.quick:
        raise CommandError("the whole benchmark is `make bench` in a checkout of the repository; here: bench --quick")
    device = device_of(options.device)
    out = file_to_write("--out", options.out, ".png") if options.out else None
    if out and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--out: matplotlib is not installed, run: pip install matplotlib")
    outcomes = []
    for row in rows():
        print(f"timing: {row.name}", file=sys.stderr)
        outcomes.append(race(row, device, SECONDS))
    title = heading(device)
    print("\n".join([title, "", *table(outcomes), "", caption(outcomes)]))
    if out:
        draw(outcomes, title, out)
        print(f"bars: {out}")
    return int(any(outcome.wrong for outcome in outcomes))
