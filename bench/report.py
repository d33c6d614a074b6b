"""Ratios of a benchmark run: `python -m bench.report results.json [--markdown] [--save bench/results/cpu.json]`."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenprune_kernels.quick.report import duration


class Row(NamedTuple):
    case: str
    ours: float  # seconds, best round
    baseline: str
    ratio: float  # baseline / ours
    target: float | None
    note: str = ""


def rows(results: dict[str, Any]) -> list[Row]:
    """One row for every baseline of every case that was raced."""
    table = []
    for bench in results["benchmarks"]:
        info = bench["extra_info"]
        for name, ratio in info.get("ratios", {}).items():
            if name != "ours":
                target = info.get("target")
                wanted = target[1] if target and target[0] == name else None
                table.append(Row(info["case"], info["seconds"]["ours"], name, ratio, wanted, info.get("note", "")))
    return table


def cells(row: Row) -> tuple[str, str, str, str, str, str]:
    target = f"{row.target:.3g}x" if row.target else ""
    return row.case, duration(row.ours), row.baseline, f"{row.ratio:.2f}x", target, row.note


def summary(results: dict[str, Any], command: str = "make bench") -> dict[str, Any]:
    """What is worth keeping of a run: where it ran (no host name), at which commit, and the rows."""
    import torch

    machine, commit = results["machine_info"], results["commit_info"]
    return {
        "cpu": machine["cpu"].get("brand_raw", machine["processor"]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": machine["python_version"],
        "commit": commit["id"][:12] + (" with changes" if commit["dirty"] else ""),
        "command": command,
        "rows": [row._asdict() for row in rows(results)],
    }


HEADER = ("case", "ours", "baseline", "baseline / ours", "target", "note")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="file written by pytest --benchmark-json")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table instead of a terminal table")
    parser.add_argument("--save", type=Path, help="write the summary of the run to this file")
    parser.add_argument("--command", default="make bench", help="what the summary names as its command")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(summary(results, arguments.command), indent=1) + "\n")
    table = [cells(row) for row in rows(results)]
    if arguments.markdown:
        for line in (HEADER, ("---",) * len(HEADER), *table):
            print("| " + " | ".join(line) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    printed = Table(*HEADER)
    for row in table:
        printed.add_row(*row)
    Console(width=160).print(printed)


if __name__ == "__main__":
    main()
