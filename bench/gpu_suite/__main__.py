"""`python -m bench.gpu_suite --out DIR`: build, correctness, sanitizer, timings and plans on the GPU of this machine.

Without a GPU, or with --dry-run, the same stages run on toy sizes with the emulated kernels: that tests the suite.
Every stage is on its own: one that fails is recorded and the others go on. DIR/results.json and DIR/report.md are
rewritten after every stage, so that a kill loses nothing that was finished; logs.tar.gz comes last.
docs/gpu.md says how to read them.
"""

import argparse
import os
import shlex
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from . import build, correctness, environment, ncu, report, sanitizer
from .work import Run, Stage

SCHEMA = 3
RESERVE = 6.0  # seconds kept for the last report
LOGS = "logs.tar.gz"  # one file: a machine that is lent may give few files back
NO_LOGS = ("controls", "triton-cache")
# The stages and the most seconds each may take, correctness before times. Stages of one group run at the same time;
# those that measure times are alone.
GROUPS: tuple[dict[str, float], ...] = (
    {"environment": 60}, {"build": 260}, {"contact": 60}, {"behaviour": 90, "correctness": 90, "sanitizer": 90},
    {"floors": 30}, {"timing": 120},
    {"tune": 80}, {"ncu": 45}, {"peers": 60}, {"triton": 65}, {"triton_warm": 25}, {"triton_tests": 120},
    {"compiled": 120},
)  # fmt: skip
STAGES = {name: seconds for group in GROUPS for name, seconds in group.items()}
# All others are those of worker.py.
FUNCTIONS: dict[str, Callable[[Run], Stage]] = {
    "environment": environment.run,
    "build": build.run,
    "correctness": correctness.run,
    "sanitizer": sanitizer.run,
    "ncu": ncu.run,
    "triton_tests": lambda run: correctness.run(run, "triton"),
}
# What one call on a lent machine takes: the other half is the next call's, or nobody's.
FIRST = [*STAGES][: [*STAGES].index("tune")]
PARTS = {1: FIRST, 2: ["environment", "build", *(name for name in STAGES if name not in FIRST)]}
# Timings and checks see the package as users do, whatever the caller's shell has.
UNSET = ("TEST_GPU", "POISON", "CHECK_INDICES", "BACKEND", "PLAN")
DRY = {"TOKENPRUNE_TEST_GPU": "emulated", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def run_stage(name: str, run: Run) -> Stage:
    """One stage within its time; whatever it raises becomes its result."""
    cap = STAGES[name] * (3 if run.dry else 1)  # what shares its cores with others is slower
    began = time.monotonic()
    left = run.end - RESERVE - began
    if left < 3:
        return {"status": "skipped", "reason": "out of time", "summary": {}, "seconds": 0.0}
    run.say(f"{name}: starts, {min(cap, left):.0f} s at most")
    try:
        function = FUNCTIONS.get(name, lambda run: run.worker(name))
        stage = function(replace(run, deadline=began + min(cap, left)))
    except Exception as error:
        stage = {"status": "error", "reason": f"{type(error).__name__}: {error}", "summary": {},
                 "trace": traceback.format_exc()[-3000:]}  # fmt: skip
    stage["seconds"] = round(time.monotonic() - began, 1)
    counts = " ".join(f"{key}={value}" for key, value in stage["summary"].items())
    reason = f" ({shorten(stage['reason'], 200)})" if stage.get("reason") else ""
    run.say(f"{name}: {stage['status']} in {stage['seconds']} s {counts}{reason}")
    return stage


def run_stages(wanted: set[str], run: Run, about: dict[str, Any]) -> None:
    """Group by group; what has been found so far is on disk after every stage."""
    lock = threading.Lock()

    def one(name: str) -> None:
        stage = run_stage(name, run)
        with lock:
            run.results[name] = stage
            report.write({**about, "seconds": round(time.monotonic() - run.began, 1), "stages": run.results}, run.out)

    for group in GROUPS:
        with ThreadPoolExecutor(max_workers=len(group)) as pool:
            list(pool.map(one, [name for name in group if name in wanted]))


def parse() -> tuple[argparse.Namespace, str]:
    """The arguments, and the command without the folder, which matters on this machine only."""
    out = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    out.add_argument("--out", type=Path, required=True, help="folder for the results; emptied of earlier ones")
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__, parents=[out])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes and the emulator, although there is a GPU")
    parser.add_argument("--seconds", type=float, default=470, help="the whole time budget (default: %(default)s)")
    parser.add_argument("--rows", default="", metavar="PATTERN", help="only rows whose name this expression finds")
    parser.add_argument("--part", type=int, choices=PARTS, help="1: right, and how fast; 2: plans, peers and Triton")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--skip", nargs="+", choices=STAGES, default=[], metavar="STAGE", help=", ".join(STAGES))
    return parser.parse_args(), shlex.join(["python", "-m", "bench.gpu_suite", *out.parse_known_args()[1]])


def main() -> int:
    arguments, command = parse()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "report.md", "plans.csv", LOGS):
        (out / name).unlink(missing_ok=True)
    gpu = torch.cuda.is_available()
    dry = "--dry-run" if arguments.dry_run else not gpu and "torch finds no CUDA device"  # why it is one, or False
    for name in ("TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", *(f"TOKENPRUNE_{name}" for name in UNSET)):
        os.environ.pop(name, None)
    os.environ |= {"PYTHONUNBUFFERED": "1", **(DRY if dry else {})}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tokenprune-gpu-") as folder:
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder, "triton-cache"))  # empty: first calls compile
        run = Run(out, Path(folder), bool(dry), arguments.rows, began, end=began + arguments.seconds)
        if dry:
            run.say(f"DRY RUN ({dry}): toy sizes, emulated kernels, no measurement")
        about = {"schema": SCHEMA, "dry_run": dry, "command": command, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        run_stages({*arguments.only} & {*PARTS.get(arguments.part, STAGES)} - {*arguments.skip}, run, about)
        with tarfile.open(out / LOGS, "w:gz") as archive:
            archive.add(folder, "logs", filter=lambda info: None if info.name.endswith(NO_LOGS) else info)
    print((out / "report.md").read_text() if run.results else "no stage ran", flush=True)
    took = ", ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in run.results.items())
    run.say(f"results in {arguments.out}; {took}; {time.monotonic() - began:.0f} s in all")
    return 1 if any(s["status"] in ("failed", "error") for s in run.results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
