"""compute-sanitizer over every op: a process per tool and op, several at a time.

Before that each tool has to find a fault that was planted for it (controls.cu). Memory comes straight from the driver
(no caching allocator), so that every tensor has bounds of its own.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from testing import ROOT, op_samples

from .environment import find_program
from .work import Item, Run, Stage, summarize

# With options of each alone: padding makes an overflow by a little leave its tensor.
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": ("--padding", "256"), "racecheck": (), "initcheck": (), "synccheck": (),
}  # fmt: skip
FOUND = 86  # exit code of the tool when it has found something
SECONDS = 150.0
MEMORY = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TOKENPRUNE_POISON": "0"}  # poison would count as initialised
REFUSALS = ("Device not supported", "Failed to initialize", "Unable to find injection", "not supported on this")
DRY_OPS = ("score_entropy", "gather_compact")


def tool_command(program: str, tool: str) -> list[str]:
    common = ("--error-exitcode", str(FOUND), "--print-limit", "10", "--target-processes", "all")
    return [program, "--tool", tool, *common, *TOOLS[tool]]


def reports(output: str) -> list[str]:
    """The tool's own lines, each after the sample that was running."""
    found, sample = [], ""
    for line in output.splitlines():
        if line.startswith("SAMPLE "):
            sample = line[7:]
        elif line.startswith("=========") and line.strip("= "):
            found.append(f"{sample}: {line.strip('= ')}"[:300])
    return found


def verdict(code: int | None, output: str, planted: bool = False) -> Item:
    """Of a run under a tool that should find nothing, or the planted fault."""
    lines, tail = reports(output), output.strip()[-300:]
    if code is None:
        return {"status": "skipped", "reason": f"out of time; last lines: {tail}"}
    if any(refusal in output for refusal in REFUSALS) and code != FOUND:
        return {"status": "skipped", "reason": f"the tool does not run here: {tail}"}
    if planted:
        reason = f"the tool found nothing (exit code {code}): {tail}"
        return {"status": "passed"} if code == FOUND else {"status": "failed", "reason": reason}
    if code == FOUND:
        return {"status": "failed", "reason": f"{len(lines)} lines of reports", "reports": lines[:60]}
    if code != 0 or "ALL SAMPLES DONE" not in output:
        return {"status": "failed", "reason": f"exit code {code}: {tail}"}
    warnings = [line for line in lines if "warning" in line.lower() and " 0 warnings" not in line]
    return {"status": "passed", **({"warnings": warnings[:20]} if warnings else {})}


def controls(run: Run, program: str) -> dict[str, Item]:
    """By tool; all skipped where they cannot be compiled, which is no word against the tools."""
    nvcc, binary = find_program("nvcc"), run.work / "controls"
    source = ROOT / "bench" / "gpu_suite" / "controls.cu"
    words = [str(nvcc), "-O1", "-arch=native", str(source), "-o", str(binary)]
    code, output = run.command(words, seconds=60) if nvcc else (127, "no nvcc")
    if code != 0:
        return {"all tools": {"status": "skipped", "reason": f"not compiled: {output[-300:]}"}}
    return {
        tool: verdict(*run.command([*tool_command(program, tool), str(binary), tool], seconds=30), planted=True)
        for tool in TOOLS
    }


def ported(run: Run) -> list[str]:
    """The ops that passed the first contact; all of them when that stage did not run."""
    contact = {item["name"]: item["status"] for item in run.results.get("contact", {}).get("items", [])}
    return [op for op in op_samples.OPS if contact.get(op, "passed") not in ("missing", "crashed", "hung")]


def run(run: Run) -> Stage:
    program, found = find_program("compute-sanitizer"), {}
    if run.dry:
        tasks = [("no tool", op) for op in DRY_OPS]
    elif program is None:
        return {"status": "skipped", "reason": "compute-sanitizer was not found", "summary": {}, "items": []}
    else:
        found = controls(run, program)
        usable = [tool for tool in TOOLS if found.get(tool, {}).get("status") != "skipped"]
        tasks = [(tool, op) for tool in usable for op in ported(run)]

    def one(task: tuple[str, str]) -> Item:
        tool, op = task
        began = time.monotonic()
        words = tool_command(str(program), tool) if tool in TOOLS else []
        driver = [sys.executable, "-m", "bench.gpu_suite.worker", "sanitize", "-", "--rows", op]
        code, output = run.command([*words, *driver], SECONDS, **MEMORY)
        (run.work / f"sanitizer-{tool}-{op}.log").write_text(output[-200_000:])
        return {"name": f"{tool} {op}", "took": round(time.monotonic() - began, 1), **verdict(code, output)}

    with ThreadPoolExecutor(max_workers=run.processes) as pool:
        items = [*pool.map(one, tasks)]
    planted = [{"name": f"planted fault, {tool}", **item} for tool, item in found.items()]
    cut = sum(item.get("reason", "").startswith("out of time") for item in items)
    return summarize([*planted, *items], f"{cut} of {len(tasks)} runs had no time" if cut else None)
