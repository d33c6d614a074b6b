"""compute-sanitizer over every op: a process per tool and op, several at a time.

Before that each tool has to find a fault that was planted for it (controls.cu). Memory comes straight from the driver
(no caching allocator), so that every tensor has bounds of its own.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from testing import ROOT

from . import work
from .environment import find_program
from .run import Run, summarize

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # exit code of the tool when it has found something
SECONDS = 150.0
MEMORY = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TOKENPRUNE_POISON": "0"}  # poison would count as initialised
REFUSALS = ("Device not supported", "Failed to initialize", "Unable to find injection", "not supported on this")
# Taken where this version of the tool has them. Padding makes an overflow by a little leave its tensor.
OPTIONAL = {"memcheck": ("--padding", "256"), "initcheck": (), "racecheck": (), "synccheck": ()}
DRY_OPS = ("score_entropy", "gather_compact")


def tool_command(program: str, tool: str, usage: str) -> list[str]:
    words = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    optional = OPTIONAL[tool]
    if optional and optional[0] in usage:
        words += optional
    for option, value in (("--print-limit", "10"), ("--target-processes", "all")):
        if option in usage:
            words += [option, value]
    return words


def reports(output: str) -> list[str]:
    """The tool's own lines, each after the sample that was running."""
    found, sample = [], ""
    for line in output.splitlines():
        if line.startswith("SAMPLE "):
            sample = line[7:]
        elif line.startswith("=========") and line.strip("= "):
            found.append(f"{sample}: {line.strip('= ')}"[:300])
    return found


def verdict(name: str, code: int | None, output: str, seconds: float) -> work.Item:
    """A run under a tool that should find nothing."""
    item: work.Item = {"name": name, "took": round(seconds, 1)}
    lines = reports(output)
    if code is None:
        return {**item, "status": "skipped", "reason": f"out of time; last lines: {output[-200:]}"}
    if any(refusal in output for refusal in REFUSALS):
        return {**item, "status": "skipped", "reason": f"the tool does not run here: {output.strip()[-300:]}"}
    if code == FOUND:
        return {**item, "status": "failed", "reason": f"{len(lines)} lines of reports", "reports": lines[:60]}
    if code != 0 or "ALL SAMPLES DONE" not in output:
        return {**item, "status": "failed", "reason": f"exit code {code}: {output.strip()[-600:]}"}
    warnings = [line for line in lines if "warning" in line.lower() and " 0 warnings" not in line]
    return {**item, "status": "passed", **({"warnings": warnings[:20]} if warnings else {})}


def control_verdict(tool: str, code: int | None, output: str) -> work.Item:
    """A run under the tool that has to find the planted fault."""
    item: work.Item = {"name": f"planted fault, {tool}"}
    if code == FOUND:
        return {**item, "status": "passed"}
    if code is None or any(refusal in output for refusal in REFUSALS):
        return {**item, "status": "skipped", "reason": f"the tool does not run here: {output.strip()[-300:]}"}
    return {**item, "status": "failed", "reason": f"the tool found nothing (exit code {code}): {output.strip()[-300:]}"}


def controls(run: Run, program: str, usage: str) -> list[work.Item]:
    nvcc, binary = find_program("nvcc"), run.work / "controls"
    if nvcc is None:
        return [{"name": "planted faults", "status": "skipped", "reason": "no nvcc to compile them"}]
    source = ROOT / "bench" / "gpu_suite" / "controls.cu"
    code, output = run.command([nvcc, "-O1", "-arch=native", str(source), "-o", str(binary)], seconds=60)
    if code != 0:
        return [{"name": "planted faults", "status": "skipped", "reason": f"nvcc failed: {output[-300:]}"}]
    found = []
    for tool in TOOLS:
        code, output = run.command([*tool_command(program, tool, usage), str(binary), tool], seconds=30)
        found.append(control_verdict(tool, code, output))
    return found


def ported(run: Run) -> list[str]:
    """The ops that passed the first contact; all of them when that stage did not run."""
    from testing import op_samples

    contact = run.results.get("contact", {}).get("items", [])
    known = {item["name"]: item["status"] for item in contact}
    return [op for op in op_samples.OPS if known.get(op, "passed") not in ("missing", "crashed", "hung")]


def run(run: Run) -> dict[str, Any]:
    import time

    program = find_program("compute-sanitizer")
    driver = [sys.executable, "-m", "bench.gpu_suite.sanitize_one"]
    items: list[work.Item] = []
    if run.dry:
        tasks = [("no tool", [], op) for op in DRY_OPS]
    elif program is None:
        return {"status": "skipped", "reason": "compute-sanitizer was not found", "summary": {}, "items": []}
    else:
        _, usage = run.command([program, "--help"], seconds=20)
        items = controls(run, program, usage)
        refused = {item["name"].split(", ")[-1] for item in items if item["status"] == "skipped"}
        usable = [tool for tool in TOOLS if tool not in refused]
        tasks = [(tool, tool_command(program, tool, usage), op) for tool in usable for op in ported(run)]

    def one(task: tuple[str, list[str], str]) -> work.Item:
        tool, words, op = task
        if run.left() < 5:
            return {"name": f"{tool} {op}", "status": "skipped", "reason": "out of time"}
        began = time.monotonic()
        code, output = run.command([*words, *driver, op], SECONDS, **MEMORY)
        log = run.work / "sanitizer" / f"{tool}-{op}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output[-200_000:])
        return verdict(f"{tool} {op}", code, output, time.monotonic() - began)

    with ThreadPoolExecutor(max_workers=run.processes) as pool:
        items += pool.map(one, tasks)
    cut = sum(item.get("reason", "").startswith("out of time") for item in items)
    return summarize(items, f"{cut} of {len(tasks)} runs had no time" if cut else None)
