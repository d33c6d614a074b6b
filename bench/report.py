"""Print the ratios of a benchmark run: `python -m bench.report results.json [--markdown]`."""

import argparse
import json
from pathlib import Path
from typing import Any


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(case, ours, baseline, ratio, target) for every baseline of every case."""
    table = []
    for bench in results["benchmarks"]:
        info = bench["extra_info"]
        if "ratios" not in info:
            continue
        ours = f"{info['seconds']['ours'] * 1e3:.3g} ms"
        for name, ratio in info["ratios"].items():
            if name != "ours":
                target = info.get("target")
                wanted = f"{target[1]:g}x" if target and target[0] == name else ""
                table.append((info["case"], ours, name, f"{ratio:.2f}x", wanted))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="file written by pytest --benchmark-json")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table instead of a terminal table")
    arguments = parser.parse_args()
    header = ("case", "ours", "baseline", "baseline / ours", "target")
    table = rows(json.loads(arguments.results.read_text()))
    if arguments.markdown:
        for line in (header, ("---",) * len(header), *table):
            print("| " + " | ".join(line) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    printed = Table(*header)
    for row in table:
        printed.add_row(*row)
    Console(width=160).print(printed)


if __name__ == "__main__":
    main()
