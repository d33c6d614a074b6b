"""`python -m bench.gpu_suite --out DIR`: build, correctness, sanitizer, timings and plans on the GPU of this machine.

Without a GPU, or with --dry-run, the same stages run on toy sizes with the emulated kernels: that tests the suite.
Every stage is on its own: one that fails is recorded and the others go on. DIR/results.json and DIR/report.md are
rewritten after every stage, so that a kill loses nothing that was finished; logs.tar.gz comes last.
docs/gpu.md says how to read them.
"""

import argparse
import os
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
from typing import Any

from . import build, correctness, environment, ncu, report, sanitizer
from .run import Run, Stage, summarize

SCHEMA = 2
RESERVE = 6.0  # seconds kept for the last report
LOGS = "logs.tar.gz"  # one file: a machine that is lent may give few files back
NO_LOGS = ("controls", "triton-cache")


def worker(name: str, item_seconds: float) -> Callable[[Run], Stage]:
    return lambda run: summarize(*run.worker(name, item_seconds=item_seconds))


# name -> (what it does, the most seconds it may take), correctness before times. Stages of one group run at the same
# time; those that measure times are alone.
FIRST: tuple[dict[str, tuple[Callable[[Run], Stage], float]], ...] = (
    {"environment": (environment.run, 60)},
    {"build": (build.run, 260)},
    {"contact": (worker("contact", 45), 60)},
    {
        "behaviour": (worker("behaviour", 45), 90),
        "correctness": (correctness.run, 90),
        "sanitizer": (sanitizer.run, 90),
    },
    {"floors": (worker("floors", 30), 30)},
    {"timing": (worker("timing", 45), 120)},
)
SECOND: tuple[dict[str, tuple[Callable[[Run], Stage], float]], ...] = (
    {"tune": (worker("tune", 45), 80)},
    {"ncu": (ncu.run, 45)},
    {"peers": (worker("peers", 60), 60)},
    {"triton": (worker("triton", 60), 65)},
    {"triton_warm": (worker("triton_warm", 30), 25)},
    {"triton_tests": (lambda run: correctness.run(run, "triton"), 120)},
    {"compiled": (worker("compiled", 90), 120)},
)
GROUPS = (*FIRST, *SECOND)
STAGES = {name: stage for group in GROUPS for name, stage in group.items()}
# What one call on a lent machine takes: the other half is the next call's, or nobody's.
PARTS = {1: tuple(n for g in FIRST for n in g), 2: ("environment", "build", *(n for g in SECOND for n in g))}


class Results:
    """What has been found so far, on disk after every stage."""

    def __init__(self, run: Run, dry_run: str | bool, command: str) -> None:
        self.run, self._lock = run, threading.Lock()
        self.data: dict[str, Any] = {
            "schema": SCHEMA, "dry_run": dry_run, "command": command,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"), "seconds": 0.0, "stages": run.results,
        }  # fmt: skip

    def add(self, name: str, stage: Stage) -> None:
        with self._lock:
            self.run.results[name] = stage
            self.data["seconds"] = round(time.monotonic() - self.run.began, 1)
            report.write(self.data, self.run.out)


def run_stage(name: str, run: Run, results: Results) -> None:
    """One stage within its time; whatever it raises becomes its result."""
    function, cap = STAGES[name]
    cap *= 3 if run.dry else 1  # what shares its cores with others is slower
    began = time.monotonic()
    left = run.end - RESERVE - began
    if left < 3:
        results.add(name, {"status": "skipped", "reason": "out of time", "summary": {}, "seconds": 0.0})
        return
    run.say(f"{name}: starts, {min(cap, left):.0f} s at most")
    try:
        stage = function(replace(run, deadline=began + min(cap, left)))
    except Exception as error:
        stage = {"status": "error", "reason": f"{type(error).__name__}: {error}", "summary": {},
                 "trace": traceback.format_exc()[-3000:]}  # fmt: skip
    stage["seconds"] = round(time.monotonic() - began, 1)
    results.add(name, stage)
    counts = " ".join(f"{key}={value}" for key, value in stage.get("summary", {}).items())
    reason = f" ({report.one_line(stage['reason'], 200)})" if stage.get("reason") else ""
    run.say(f"{name}: {stage['status']} in {stage['seconds']} s {counts}{reason}")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; emptied of earlier ones")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes and the emulator, although there is a GPU")
    parser.add_argument("--seconds", type=float, default=470, help="the whole time budget (default: %(default)s)")
    parser.add_argument("--rows", default="", metavar="PATTERN", help="only rows whose name this expression finds")
    parser.add_argument("--part", type=int, choices=PARTS, help="1: right, and how fast; 2: plans, peers and Triton")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--skip", nargs="+", choices=STAGES, default=[], metavar="STAGE",
                        help=f"of {', '.join(STAGES)}")  # fmt: skip
    return parser.parse_args(words)


def described(arguments: argparse.Namespace) -> str:
    """The command without the folder, which matters on this machine only."""
    words = ["python -m bench.gpu_suite", *(["--quick"] if arguments.quick else [])]
    words += ["--rows", arguments.rows] if arguments.rows else []
    words += ["--part", str(arguments.part)] if arguments.part else []
    if arguments.only != list(STAGES):
        words += ["--only", *arguments.only]
    return " ".join([*words, *(["--skip", *arguments.skip] if arguments.skip else [])])


def why_dry(asked: bool) -> str | bool:
    """Why this is no run on a GPU, or False."""
    if asked:
        return "--dry-run"
    import torch

    return False if torch.cuda.is_available() else "torch finds no CUDA device"


def main() -> int:
    arguments = parse()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "report.md", "plans.csv", LOGS):
        (out / name).unlink(missing_ok=True)
    began = time.monotonic()
    dry = why_dry(arguments.dry_run)
    if dry:
        os.environ.update(TOKENPRUNE_TEST_GPU="emulated", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    else:
        os.environ.pop("TOKENPRUNE_TEST_GPU", None)
        os.environ.pop("TRITON_INTERPRET", None)
    # Timings and checks see the package as users do.
    for name in ("POISON", "CHECK_INDICES", "BACKEND", "PLAN"):
        os.environ.pop(f"TOKENPRUNE_{name}", None)
    os.environ.pop("CUDA_LAUNCH_BLOCKING", None)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    folder = tempfile.TemporaryDirectory(prefix="tokenprune-gpu-")
    os.environ["TRITON_CACHE_DIR"] = str(Path(folder.name) / "triton-cache")  # empty: first calls compile
    end = began + arguments.seconds
    run = Run(out, Path(folder.name), bool(dry), arguments.quick, arguments.rows, end=end, began=began)
    results = Results(run, dry, described(arguments))
    if dry:
        run.say(f"DRY RUN ({dry}): toy sizes, emulated kernels, no measurement")
    part = PARTS.get(arguments.part, tuple(STAGES))
    wanted = [name for name in arguments.only if name in part and name not in arguments.skip]
    for group in GROUPS:
        chosen = [name for name in group if name in wanted]
        with ThreadPoolExecutor(max_workers=len(group)) as pool:
            list(pool.map(lambda name: run_stage(name, run, results), chosen))
    with tarfile.open(out / LOGS, "w:gz") as archive:
        archive.add(run.work, "logs", filter=lambda info: None if info.name.endswith(NO_LOGS) else info)
    folder.cleanup()
    print((out / "report.md").read_text() if (out / "report.md").exists() else "no stage ran", flush=True)
    run.say(f"results in {arguments.out}")
    return 1 if any(s["status"] in ("failed", "error") for s in run.results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
