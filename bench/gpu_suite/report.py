"""Tables from results.json, and the part of it that is worth keeping.

`python -m bench.gpu_suite.report DIR` prints the report again; `--save bench/results/h200.json` keeps the facts of the
environment, the state of every stage and the timing rows, without logs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from . import work
from .costs import Rates, floor_seconds, measured_rates
from .run import Stage

NOT_A_MEASUREMENT = "DRY RUN on a CPU: no number below means anything."


class _Described:
    """A row's numbers as floors.py reads them."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.bytes, self.flops, self.dtype = row["bytes"], row["flops"], row["dtype"]


def verdicts(item: work.Item, rates: Rates | None) -> list[dict[str, Any]]:
    """What the row promises against what came out: {"promise", "wanted", "got", "met"}."""
    row, times = item["row"], item["times"]
    found = []

    def add(promise: str, wanted: float, got: float | None, at_least: bool) -> None:
        met = None if got is None else got >= wanted if at_least else got <= wanted
        found.append({"promise": promise, "wanted": wanted, "got": got, "met": met})

    for name, target in row["targets"].items():
        add(f"times faster than {name}", target, item["ratios"].get(name), True)
    if row["max_launches"] is not None:
        add("launches", row["max_launches"], item.get("launches", {}).get("kernels"), False)
    ours = device_microseconds(times["ours"])
    if row["max_microseconds"] is not None:
        add("microseconds", row["max_microseconds"], ours, False)
    if row["min_floor_share"] is not None:
        add("share of the floor", row["min_floor_share"], floor_share(item, rates), True)
    return found


def device_microseconds(times: dict[str, Any]) -> float | None:
    """The replay time of the graph if one was captured, else the time between events."""
    best = times.get("graph") or times.get("events")
    return best["median"] if best else None


def floor_share(item: work.Item, rates: Rates | None) -> float | None:
    """Time of the floor / our time."""
    ours = device_microseconds(item["times"]["ours"])
    if rates is None or not ours or not item["row"]["bytes"]:
        return None
    return floor_seconds(_Described(item["row"]), rates)["floor"] * 1e6 / ours


def cell(times: dict[str, Any], kind: str) -> str:
    found = times.get(kind)
    return f"{found['median']:.1f} ({found['p10']:.1f}-{found['p90']:.1f})" if found else "-"


def timing_table(stage: Stage, rates: Rates | None) -> list[str]:
    lines = [
        "| row | events, us | graph, us | host, us | launches | slower than ours | of the floor | promises |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in stage.get("items", []):
        if "times" not in item:
            continue
        ours = item["times"]["ours"]
        slower = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in item["ratios"].items())
        share = floor_share(item, rates)
        kept = [v for v in verdicts(item, rates) if v["met"] is not None]
        missed = [f"{v['promise']} {v['got']:.3g}, wanted {v['wanted']:.3g}" for v in kept if not v["met"]]
        promises = "missed: " + "; ".join(missed) if missed else f"{len(kept)} met" if kept else ""
        of_floor = "" if share is None else f"{share:.0%}"
        lines.append(
            f"| {item['name']} | {cell(ours, 'events')} | {cell(ours, 'graph')} | {ours.get('host', 0):.1f} | "
            f"{item.get('launches', {}).get('kernels')} | {slower} | {of_floor} | {promises} |"
        )
    return lines


def triton_table(stage: Stage, warm: Stage) -> list[str]:
    """The Triton kernels beside the CUDA kernels."""
    warm_ms = {item["name"]: item.get("first_call_ms") for item in warm.get("items", [])}
    lines = [
        "| row | events, us | graph, us | launches | CUDA: times faster | picks equal to CUDA's | first call, ms | "
        "first call, warm cache, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in stage.get("items", []):
        if "times" not in item:
            continue
        ours = item["times"]["ours"]
        ratio = item["ratios"].get("cuda")
        equal = item.get("agreement", {}).get("equal_integers")
        lines.append(
            f"| {item['name']} | {cell(ours, 'events')} | {cell(ours, 'graph')} | "
            f"{item.get('launches', {}).get('kernels')} | {'-' if ratio is None else f'{1 / ratio:.2f}x'} | "
            f"{'-' if equal is None else f'{equal:.1%}'} | {item['first_call_ms']} | {warm_ms.get(item['name'])} |"
        )
    return lines


def header(results: dict[str, Any]) -> list[str]:
    facts = results["stages"].get("environment", {}).get("facts", {})
    torch = facts.get("torch", {})
    return [
        "# GPU suite",
        "",
        *([f"**{NOT_A_MEASUREMENT}**", ""] if results["dry_run"] else []),
        f"- GPU: {torch.get('gpu', 'none')}; {facts.get('smi')}",
        f"- torch {torch.get('torch')}, CUDA {torch.get('torch_cuda')}, Python {facts.get('python')}",
        f"- commit: {facts.get('commit')}",
        f"- library: {results['stages'].get('build', {}).get('summary', {}).get('library')}",
        f"- {results['seconds']:.0f} s in all",
    ]


def one_line(text: Any, size: int = 300) -> str:
    return " ".join(str(text).split())[:size]


def render(results: dict[str, Any]) -> str:
    stages = results["stages"]
    lines = [*header(results), "", "| stage | status | seconds | items | reason |", "|---|---|---|---|---|"]
    for name, stage in stages.items():
        counts = ", ".join(f"{k}: {v}" for k, v in stage.get("summary", {}).items())
        lines.append(
            f"| {name} | {stage['status']} | {stage.get('seconds', 0):.0f} | {counts} | "
            f"{one_line(stage.get('reason') or '', 160)} |"
        )
    rates = measured_rates(stages.get("floors", {}).get("items", []))
    if rates is not None:
        flops = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.flops.items())
        lines += ["", f"Floors: copy {rates.bandwidth / 1e12:.2f} TB/s; {flops}; launch {rates.launch * 1e6:.2f} us."]
    for name in ("timing", "compiled"):
        table = timing_table(stages.get(name, {}), rates)
        if len(table) > 2:
            lines += ["", f"## {name}", "", *table]
    table = triton_table(stages.get("triton", {}), stages.get("triton_warm", {}))
    if len(table) > 2:
        lines += ["", "## triton", "", *table]
    for item in stages.get("timing", {}).get("items", []):
        if "share" in item and item["share"] is not None:
            lines += ["", f"{item['name']}: {item['share']:.3%} of the logits (promised: under {item['max']:.0%})."]
    missing = [item["name"] for item in stages.get("contact", {}).get("items", []) if item["status"] == "missing"]
    if missing:
        lines += ["", f"No CUDA kernel in this build: {', '.join(missing)}."]
    stand_ins = sorted({op for s in stages.values() for item in s.get("items", []) for op in item.get("stand_in", [])})
    if stand_ins:
        lines += ["", f"The CPU kernel stood in, because the emulator has no CUDA kernel: {', '.join(stand_ins)}."]
    bad = [(name, item) for name, s in stages.items() for item in s.get("items", [])
           if item["status"] in work.DONE_BADLY]  # fmt: skip
    if bad:
        lines += ["", "## What went wrong", ""]
        lines += [
            f"- {name}: {item['name']}: {item['status']}: {one_line(item.get('reason', ''))}" for name, item in bad[:60]
        ]
        lines += [f"- and {len(bad) - 60} more, see results.json"] if len(bad) > 60 else []
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], folder: Path) -> None:
    """results.json and report.md, each replaced at once: a kill in between leaves the ones before."""
    for name, text in (("results.json", json.dumps(results, indent=1)), ("report.md", render(results))):
        fresh = folder / f".{name}"
        fresh.write_text(text + ("" if text.endswith("\n") else "\n"))
        fresh.replace(folder / name)


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """What is worth committing of a run."""
    stages = results["stages"]
    rates = measured_rates(stages.get("floors", {}).get("items", []))
    rows = []
    warm = {item["name"]: item.get("first_call_ms") for item in stages.get("triton_warm", {}).get("items", [])}
    for name in ("timing", "compiled", "triton"):
        for item in stages.get(name, {}).get("items", []):
            if "times" in item:
                share = floor_share(item, rates)
                fields = ["name", "times", "ratios", "launches", "check", "rotated_bytes"]
                if name == "triton":
                    item = {**item, "warm_first_call_ms": warm.get(item["name"])}
                    fields += ["agreement", "first_call_ms", "second_call_ms", "warm_first_call_ms"]
                rows.append({"stage": name, **{f: item.get(f) for f in fields}, "floor_share": share,
                             "promises": verdicts(item, rates)})  # fmt: skip
    facts = stages.get("environment", {}).get("facts", {})
    return {
        "schema": results["schema"],
        "dry_run": results["dry_run"],
        "command": results["command"],
        "environment": facts,
        "stages": {
            name: {k: s.get(k) for k in ("status", "seconds", "summary", "reason")} for name, s in stages.items()
        },
        "floors": stages.get("floors", {}).get("items", []),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the --out of a run")
    parser.add_argument("--save", type=Path, help="write what is worth keeping to this file")
    arguments = parser.parse_args()
    results = json.loads((arguments.folder / "results.json").read_text())
    print(render(results))
    if arguments.save:
        if results["dry_run"]:
            raise SystemExit("a dry run has nothing worth keeping")
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(kept(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
