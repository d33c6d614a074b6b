"""Tables from results.json, and the part of it that is worth keeping.

`python -m bench.gpu_suite.report DIR...` prints the report again, of several runs as one; with `--save FILE` it keeps
the facts of the environment, the state of every stage and the rows, without logs.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.gpu_timer import device_microseconds

from . import work
from .costs import Rates, floor_seconds, measured_rates
from .run import Stage
from .tune import table as plans_table

NOT_A_MEASUREMENT = "DRY RUN on a CPU: no number below means anything."
TIMED = ("timing", "peers", "compiled", "triton")
# What is kept of a row beside its floor and promises.
FIELDS = ("name", "backend", "times", "ratios", "launches", "check", "rotated_bytes", "agreement", "first_call_ms",
          "second_call_ms", "warm_first_call_ms")  # fmt: skip


def items_of(stages: dict[str, Stage], name: str) -> list[work.Item]:
    return stages.get(name, {}).get("items", [])


def timed(stages: dict[str, Stage], name: str) -> list[work.Item]:
    return [item for item in items_of(stages, name) if "times" in item]


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
    if row["max_microseconds"] is not None:
        add("microseconds", row["max_microseconds"], device_microseconds(times["ours"]), False)
    if row["min_floor_share"] is not None:
        add("share of the floor", row["min_floor_share"], floor_share(item, rates), True)
    return found


def floor_share(item: work.Item, rates: Rates | None) -> float | None:
    """Time of the floor / our time."""
    ours = device_microseconds(item["times"]["ours"])
    if rates is None or not ours or not item["row"]["bytes"]:
        return None
    return floor_seconds(SimpleNamespace(**item["row"]), rates)["floor"] * 1e6 / ours


def cell(times: dict[str, Any], kind: str) -> str:
    found = times.get(kind)
    return f"{found['median']:.1f} ({found['p10']:.1f}-{found['p90']:.1f})" if found else "-"


def kernel_cell(item: work.Item) -> str:
    """The microseconds of every kernel of a call, in order."""
    plan = item.get("launches", {}).get("plan") or []
    return " + ".join(f"{kernel['us']:.1f}" for kernel in plan if kernel.get("us") is not None) or "-"


def markdown(title: str, header: str, rows: list[list[Any]]) -> list[str]:
    """A table, or nothing without rows."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    columns = header.count("|") + 1
    return ["", f"## {title}", "", f"| {header} |", "|" + "---|" * columns, *lines] if rows else []


def timing_table(name: str, items: list[work.Item], rates: Rates | None) -> list[str]:
    rows: list[list[Any]] = []
    for item in items:
        ours, share = item["times"]["ours"], floor_share(item, rates)
        kept = [v for v in verdicts(item, rates) if v["met"] is not None]
        missed = [f"{v['promise']} {v['got']:.3g}, wanted {v['wanted']:.3g}" for v in kept if not v["met"]]
        rows.append([
            item["name"], cell(ours, "events"), cell(ours, "graph"), f"{ours.get('host', 0):.1f}",
            item.get("launches", {}).get("kernels"), kernel_cell(item),
            ", ".join(f"{other} {ratio:.1f}x" for other, ratio in item["ratios"].items()),
            "" if share is None else f"{share:.0%}",
            "missed: " + "; ".join(missed) if missed else f"{len(kept)} met" if kept else "",
        ])  # fmt: skip
    return markdown(name, "row | events, us | graph, us | host, us | launches | kernels, us | slower than ours | "
                    "of the floor | promises", rows)  # fmt: skip


def triton_table(items: list[work.Item], warm: list[work.Item]) -> list[str]:
    """The Triton kernels beside the CUDA kernels."""
    warm_ms = {item["name"]: item.get("first_call_ms") for item in warm}
    rows: list[list[Any]] = []
    for item in items:
        ours, ratio = item["times"]["ours"], item["ratios"].get("cuda")
        equal = item.get("agreement", {}).get("equal_integers")
        rows.append([
            item["name"], cell(ours, "events"), cell(ours, "graph"), item.get("launches", {}).get("kernels"),
            "-" if ratio is None else f"{1 / ratio:.2f}x", "-" if equal is None else f"{equal:.1%}",
            item.get("first_call_ms"), warm_ms.get(item["name"]),
        ])  # fmt: skip
    return markdown("triton", "row | events, us | graph, us | launches | CUDA: times faster | picks equal to CUDA's | "
                    "first call, ms | first call, warm cache, ms", rows)  # fmt: skip


def tune_table(items: list[work.Item]) -> list[str]:
    rows = [
        [i["name"], f"{i['own_us']:.2f}", f"{i['best_us']:.2f}", i["best"] or "its own"] for i in items if "best" in i
    ]
    return markdown("tune", "row | planner's own, us | best, us | plan", rows)


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


def remarks(stages: dict[str, Stage]) -> list[str]:
    """What does not fit into a table, and what went wrong."""
    lines: list[str] = []
    for item in items_of(stages, "timing"):
        if item.get("share") is not None:
            lines += ["", f"{item['name']}: {item['share']:.3%} of the logits (promised: under {item['max']:.0%})."]
    if missing := [item["name"] for item in items_of(stages, "contact") if item["status"] == "missing"]:
        lines += ["", f"No CUDA kernel in this build: {', '.join(missing)}."]
    every = [(name, item) for name in stages for item in items_of(stages, name)]
    if stand_ins := sorted({op for _, item in every for op in item.get("stand_in", [])}):
        lines += ["", f"The CPU kernel stood in, because the emulator has no CUDA kernel: {', '.join(stand_ins)}."]
    bad = [(name, item) for name, item in every if item["status"] in work.DONE_BADLY]
    told = [f"- {n}: {item['name']}: {item['status']}: {one_line(item.get('reason', ''))}" for n, item in bad[:60]]
    more = [f"- and {len(bad) - 60} more, see results.json"] if len(bad) > 60 else []
    return [*lines, *(["", "## What went wrong", "", *told, *more] if bad else [])]


def render(results: dict[str, Any]) -> str:
    stages = results["stages"]
    lines = [*header(results), "", "| stage | status | seconds | items | reason |", "|---|---|---|---|---|"]
    for name, stage in stages.items():
        counts = ", ".join(f"{k}: {v}" for k, v in stage.get("summary", {}).items())
        why = one_line(stage.get("reason") or "", 160)
        lines.append(f"| {name} | {stage['status']} | {stage.get('seconds', 0):.0f} | {counts} | {why} |")
    rates = measured_rates(items_of(stages, "floors"))
    if rates is not None:
        flops = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.flops.items())
        lines += ["", f"Floors: copy {rates.bandwidth / 1e12:.2f} TB/s; {flops}; launch {rates.launch * 1e6:.2f} us."]
    for name in ("timing", "peers", "compiled"):
        lines += timing_table(name, timed(stages, name), rates)
    lines += triton_table(timed(stages, "triton"), items_of(stages, "triton_warm"))
    lines += tune_table(items_of(stages, "tune"))
    for item in items_of(stages, "ncu"):
        lines += markdown(
            f"ncu: {item['name']}", "metric | value", [[*pair] for pair in item.get("metrics", {}).items()]
        )
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
    """What is worth committing of a run."""
    stages = results["stages"]
    rates = measured_rates(items_of(stages, "floors"))
    warm = {item["name"]: item.get("first_call_ms") for item in items_of(stages, "triton_warm")}
    rows = [
        {"stage": name, **{f: item[f] for f in FIELDS if f in item}, "floor_share": floor_share(item, rates),
         "promises": verdicts(item, rates),
         **({"warm_first_call_ms": warm.get(item["name"])} if name == "triton" else {})}
        for name in TIMED for item in timed(stages, name)
    ]  # fmt: skip
    states = ("status", "seconds", "summary", "reason")
    return {
        **{name: results[name] for name in ("schema", "dry_run", "command")},
        "environment": stages.get("environment", {}).get("facts", {}),
        "device": next((item for item in items_of(stages, "contact") if item["name"] == "device limits"), None),
        "stages": {name: {k: s.get(k) for k in states} for name, s in stages.items()},
        **{name: items_of(stages, name) for name in ("floors", "tune", "ncu")},
        "rows": rows,
    }


def merged(folders: list[Path]) -> dict[str, Any]:
    """Several runs as one: stages of the first folder that has them."""
    runs = [json.loads((folder / "results.json").read_text()) for folder in folders]
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
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="the --out of a run")
    parser.add_argument("--save", type=Path, help="write what is worth keeping to this file")
    arguments = parser.parse_args()
    results = merged(arguments.folders)
    print(render(results))
    if arguments.save:
        if results["dry_run"]:
            raise SystemExit("a dry run has nothing worth keeping")
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(kept(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
