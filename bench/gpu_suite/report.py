"""Tables from results.json, and the part of it that is worth keeping.

`python -m bench.gpu_suite.report DIR...` prints the report again, of several runs as one; with `--save FILE` it keeps
what is worth committing, without logs: a file of the same form, which it can print too.
"""

import argparse
import json
from pathlib import Path
from textwrap import shorten
from typing import Any

from bench.gpu_timer import device_microseconds

from .floors import FLOATS, Rates, floor_seconds, measured_rates
from .tune import table as plans_table
from .work import DONE_BADLY, Item, Stage

NOT_A_MEASUREMENT = "DRY RUN on a CPU: no number below means anything."
TIMED = ("timing", "peers", "compiled", "triton")
# Whose items are worth keeping; of tests it is enough how many passed.
KEPT = (*TIMED, "triton_warm", "contact", "floors", "tune", "ncu")
Cells = list[list[Any]]


def items_of(stages: dict[str, Stage], name: str) -> list[Item]:
    return stages.get(name, {}).get("items", [])


def timed(stages: dict[str, Stage], name: str) -> list[Item]:
    return [item for item in items_of(stages, name) if "times" in item]


def floor_share(item: Item, rates: Rates | None) -> float | None:
    """Time of the floor / our time."""
    row, ours = item["row"], device_microseconds(item["times"]["ours"])
    if rates is None or not ours or not row["bytes"]:
        return None
    return floor_seconds(row["bytes"], row["flops"], row["dtype"], rates) * 1e6 / ours


def verdicts(item: Item, rates: Rates | None) -> list[dict[str, Any]]:
    """What the row promises against what came out: {"promise", "wanted", "got", "met"}."""
    row = item["row"]
    least = {f"times faster than {name}": (target, item["ratios"].get(name)) for name, target in row["targets"].items()}
    least["share of the floor"] = row["min_floor_share"], floor_share(item, rates)
    most = {
        "launches": (row["max_launches"], item.get("launches", {}).get("kernels")),
        "microseconds": (row["max_microseconds"], device_microseconds(item["times"]["ours"])),
        "bytes held": (row["max_bytes"], item["times"]["ours"].get("peak_bytes")),
    }
    return [
        {"promise": promise, "wanted": wanted, "got": got,
         "met": None if got is None else got >= wanted if promise in least else got <= wanted}
        for promise, (wanted, got) in {**least, **most}.items()
        if wanted is not None
    ]  # fmt: skip


def cell(times: dict[str, Any], kind: str) -> str:
    found = times.get(kind)
    return f"{found['median']:.1f} ({found['p10']:.1f}-{found['p90']:.1f})" if found else "-"


def kernel_cell(item: Item) -> str:
    """The microseconds of every kernel of a call, in order."""
    plan = item.get("launches", {}).get("plan") or []
    return " + ".join(f"{kernel['us']:.1f}" for kernel in plan if kernel.get("us") is not None) or "-"


def notes(item: Item, rates: Rates | None, warm_ms: dict[str, float | None]) -> str:
    """What became of the promises; how far another's picks are ours; what the first call of a Triton kernel took."""
    known = [v for v in verdicts(item, rates) if v["met"] is not None]
    told = [f"missed: {v['promise']} {v['got']:.3g}, wanted {v['wanted']:.3g}" for v in known if not v["met"]]
    if known and not told:
        told.append(f"promises met: {len(known)}")
    if (equal := item.get("agreement", {}).get("equal_integers")) is not None:
        told.append(f"{equal:.1%} of the picks equal")
    if "first_call_ms" in item:
        told.append(f"first call {item['first_call_ms']} ms, with a warm cache {warm_ms.get(item['name'])} ms")
    return "; ".join(told)


def markdown(title: str, header: str, rows: Cells) -> list[str]:
    """A table, or nothing without rows."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    columns = header.count("|") + 1
    return ["", f"## {title}", "", f"| {header} |", "|" + "---|" * columns, *lines] if rows else []


def timing_table(name: str, stages: dict[str, Stage], rates: Rates | None) -> list[str]:
    warm_ms = {item["name"]: item.get("first_call_ms") for item in items_of(stages, "triton_warm")}
    rows: Cells = []
    for item in timed(stages, name):
        ours, share = item["times"]["ours"], floor_share(item, rates)
        rows.append([
            item["name"], cell(ours, "events"), cell(ours, "graph"), f"{ours['host']:.1f}",
            item.get("launches", {}).get("kernels"), kernel_cell(item),
            ", ".join(f"{other} {ratio:.3g}x" for other, ratio in item["ratios"].items()),
            "" if share is None else f"{share:.0%}", notes(item, rates, warm_ms),
        ])  # fmt: skip
    return markdown(name, "row | events, us | graph, us | host, us | launches | kernels, us | slower than ours | "
                    "of the floor | notes", rows)  # fmt: skip


def header(results: dict[str, Any]) -> list[str]:
    facts = results["stages"].get("environment", {}).get("facts", {})
    return [
        "# GPU suite",
        "",
        *([f"**{NOT_A_MEASUREMENT}**", ""] if results["dry_run"] else []),
        f"- GPU: {facts.get('gpu') or 'none'}; {facts.get('smi')}",
        f"- torch {facts.get('torch')}, Python {facts.get('python')}",
        f"- commit: {facts.get('commit')}",
        f"- library: {results['stages'].get('build', {}).get('summary', {}).get('library')}",
        f"- {results['seconds']:.0f} s in all",
    ]


def remarks(stages: dict[str, Stage]) -> list[str]:
    """What does not fit into a table, and what went wrong."""
    lines: list[str] = []
    every = [(name, item) for name in stages for item in items_of(stages, name)]
    if stand_ins := sorted({op for _, item in every for op in item.get("stand_in", [])}):
        lines += ["", f"The CPU kernel stood in, because the emulator has no CUDA kernel: {', '.join(stand_ins)}."]
    bad = [(name, item) for name, item in every if item["status"] in (*DONE_BADLY, "missing")]
    told = [f"- {n}: {item['name']}: {item['status']}: {shorten(item.get('reason', ''), 300)}" for n, item in bad[:60]]
    more = [f"- and {len(bad) - 60} more, see results.json"] if len(bad) > 60 else []
    return [*lines, *(["", "## What went wrong", "", *told, *more] if bad else [])]


def render(results: dict[str, Any]) -> str:
    stages = results["stages"]
    rows: Cells = []
    for name, stage in stages.items():
        counts = ", ".join(f"{status}: {count}" for status, count in stage["summary"].items())
        reason = shorten(stage.get("reason") or "", 160)
        rows.append([name, stage["status"], f"{stage['seconds']:.0f}", counts, reason])
    lines = [*header(results), *markdown("stages", "stage | status | seconds | items | reason", rows)]
    rates = measured_rates(items_of(stages, "floors"))
    if rates is not None:
        copy, launch = f"{rates['bandwidth'] / 1e12:.2f} TB/s", f"{rates['launch'] * 1e6:.2f} us"
        flops = ", ".join(f"{name} {rates[name] / 1e12:.0f} TFLOP/s" for name in FLOATS)
        lines += ["", f"Floors: copy {copy}; {flops}; launch {launch}."]
    for name in TIMED:
        lines += timing_table(name, stages, rates)
    for item in items_of(stages, "ncu"):
        metrics: Cells = [[*pair] for pair in item.get("metrics", {}).items()]
        lines += markdown(f"ncu: {item['name']}", "metric | value", metrics)
    return "\n".join([*lines, *remarks(stages)]) + "\n"


def write(results: dict[str, Any], folder: Path) -> None:
    """results.json, report.md and plans.csv, each replaced at once: a kill in between leaves the ones before."""
    texts = {"results.json": json.dumps(results, indent=1) + "\n", "report.md": render(results)}
    if tuned := items_of(results["stages"], "tune"):
        texts["plans.csv"] = plans_table(tuned)
    for name, text in texts.items():
        fresh = folder / f".{name}"
        fresh.write_text(text)
        fresh.replace(folder / name)


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """What is worth committing of a run, in the same form: no logs, steps and traces, and items only of some stages."""
    stages = {}
    for name, stage in results["stages"].items():
        items = [{k: v for k, v in item.items() if k != "trace"} for item in stage.get("items", []) if name in KEPT]
        stages[name] = {k: stage.get(k) for k in ("status", "seconds", "summary", "reason", "facts")} | {"items": items}
    return {**results, "stages": stages}


def merged(paths: list[Path]) -> dict[str, Any]:
    """Several runs as one: stages of the first that has them."""
    files = [path / "results.json" if path.is_dir() else path for path in paths]
    runs = [json.loads(file.read_text()) for file in files]
    stages: dict[str, Stage] = {}
    for run in reversed(runs):
        stages |= run["stages"]
    return {
        **runs[0],
        "stages": stages,
        "seconds": sum(run["seconds"] for run in runs),
        "command": "; ".join(run["command"] for run in runs),
        "dry_run": next((run["dry_run"] for run in runs if run["dry_run"]), False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="the --out of a run, or a saved file")
    parser.add_argument("--save", type=Path, help="write what is worth keeping to this file")
    arguments = parser.parse_args()
    results = merged(arguments.runs)
    print(render(results))
    if arguments.save:
        if results["dry_run"]:
            raise SystemExit("a dry run has nothing worth keeping")
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(kept(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
