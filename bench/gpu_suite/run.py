"""What the stages share: where results go, how much time is left, how to start a worker, how items add up."""

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testing import ROOT

from . import work

Stage = dict[str, Any]


@dataclass
class Run:
    out: Path
    work: Path  # records and logs while it runs
    dry: bool
    quick: bool
    end: float  # time.monotonic() at which everything has to be over
    began: float = field(default_factory=time.monotonic)
    deadline: float = 0.0  # of the stage that runs
    results: dict[str, Stage] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes of one stage that share the device; each has a context of about half a gigabyte."""
        return 1 if self.dry else max(2, min(8, (os.cpu_count() or 2) // 2))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def worker(self, stage: str, *arguments: str, item_seconds: float) -> tuple[list[work.Item], str | None]:
        """The items of a stage of worker.py, in a process of their own."""
        record = self.work / f"{stage}.jsonl"
        command = [sys.executable, "-m", "bench.gpu_suite.worker", stage, str(record), *arguments]
        if self.quick:
            command.append("--quick")
        return work.drive(command, record, deadline=self.deadline, item_seconds=item_seconds)

    def command(self, words: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
        """(exit code or None when it had to be stopped, output) of a command within the stage's time."""
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return 127, str(error)
        try:
            output, _ = process.communicate(timeout=max(1.0, min(seconds, self.left())))
        except subprocess.TimeoutExpired:
            work.stop(process)
            return None, (process.stdout.read() if process.stdout else b"").decode(errors="replace")
        return process.returncode, output.decode(errors="replace")


def summarize(items: list[work.Item], problem: str | None = None) -> Stage:
    """A stage's result from its items: failed when one did badly, incomplete when some could not run."""
    counts = Counter(item["status"] for item in items)
    bad = sum(counts[status] for status in work.DONE_BADLY)
    status = "failed" if bad else "incomplete" if problem else "passed" if counts["passed"] else "skipped"
    stage: Stage = {"status": status, "summary": dict(counts), "items": items}
    if problem:
        stage["reason"] = problem
    return stage
