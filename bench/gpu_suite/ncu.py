"""Nsight Compute on six kernels: what limits them, in the tool's own words, with the clocks left alone."""

import csv
import sys

from .environment import find_program
from .work import Item, Run, Stage, summarize

# Row (a pattern of its name) and kernel: the one that decides the row's time.
KERNELS = (
    ("scores long", "attention_columns"),
    ("scores square", "attention_rows"),
    ("repulsion 2880x4096", "gram_greedy"),
    ("NMS 576x4096", "nms_weights"),
    ("cosine_scores 2880x4096", "similarity_kernel"),
    ("gather_compact .* 16384", "gather_compact"),
)
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
SECONDS = 60.0


def metrics(output: str) -> dict[str, str]:
    """ "section: metric [unit]" -> value, from the tool's CSV, which stands after its messages."""
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return {
        f"{row['Section Name']}: {row['Metric Name']} [{row['Metric Unit']}]": row["Metric Value"]
        for row in csv.DictReader(lines[begin:])
        if row.get("Metric Name")
    }


def command(program: str, kernel: str) -> list[str]:
    """What stands before the program that launches the kernel."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    return [
        program, "--clock-control", "none", "--csv", "--page", "details", *sections, "--target-processes", "all",
        "--kernel-name", f"regex:{kernel}", "--launch-skip", "1", "--launch-count", "1",
    ]  # fmt: skip


def run(run: Run) -> Stage:
    program = find_program("ncu")
    if program is None and not run.dry:
        return {"status": "skipped", "reason": "ncu was not found", "summary": {}, "items": []}
    items: list[Item] = []
    for row, kernel in (("score_entropy", "no tool"),) if run.dry else KERNELS:
        words = [] if run.dry else command(str(program), kernel)
        once = [sys.executable, "-m", "bench.gpu_suite.worker", "once", "-", "--rows", row]
        code, output = run.command([*words, *once], SECONDS)
        (run.work / f"ncu-{kernel}.log").write_text(output)
        item: Item = {"name": f"{kernel}, {row}", "status": "passed", "metrics": metrics(output)}
        if code != 0 or not (item["metrics"] or run.dry):  # out of time, or a machine that forbids the counters
            item.update(status="skipped", reason=f"exit code {code}: {output.strip()[-300:]}")
        items.append(item)
    return summarize(items)
