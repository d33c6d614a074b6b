"""Stages as processes: named items that run one after the other in a process of their own, recorded as JSON lines.

A kernel that reads out of bounds leaves its process without a usable GPU, and one that waits forever never returns.
So the parent restarts a process that breaks or hangs, and what had been started before is not run again: one bad item
costs one item. Every line is on disk before the next item starts, so that nothing is lost when time runs out.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from testing import ROOT
from testing.gpu_device import MissingError, UnavailableError

BROKEN = 75  # exit code: the device is unusable in this process
STARTED = "started"  # the status of an item that has not ended
DONE_BADLY = ("failed", "crashed", "hung")
STARTUP_SECONDS = 90.0  # importing torch and making a context, or compiling the emulator
ITEM_SECONDS = 60.0  # an item that takes longer hangs
Item = dict[str, Any]
Items = dict[str, Callable[[], Item]]
Stage = dict[str, Any]


def write(path: Path, name: str, status: str, **detail: Any) -> None:
    """Adds a line, after a line break: the one before may have been cut off with its process."""
    with path.open("a") as file:
        file.write("\n" + json.dumps({"name": name, "status": status, **detail}))


def read(path: Path) -> dict[str, Item]:
    """The items of a record by name, in order, each as its last line has it."""
    items: dict[str, Item] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # cut off
            item = json.loads(line)
            items[item["name"]] = item
    return items


def run_items(items: Items, path: Path, broken: Callable[[], str | None]) -> None:
    """Run what the record does not have yet. Exits with BROKEN when the device did not survive an item."""
    seen = read(path)
    for name, run in items.items():
        if name in seen:
            continue
        write(path, name, STARTED)
        began = time.monotonic()
        try:
            detail = {"status": "passed", **(run() or {})}
        except (MissingError, UnavailableError) as error:
            detail = {"status": "missing" if isinstance(error, MissingError) else "skipped", "reason": str(error)}
        except Exception as error:
            trace = "".join(traceback.format_exception(error)).strip()[-2400:]
            detail = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000], "trace": trace}
        write(path, name, took=round(time.monotonic() - began, 4), **detail)
        if detail["status"] == "failed" and (reason := broken()):
            print(f"the device is unusable after {name}: {reason}", flush=True)
            sys.exit(BROKEN)


def summarize(items: list[Item], problem: str | None = None) -> Stage:
    """A stage's result from its items: failed when one did badly, incomplete when some could not run."""
    counts = Counter(item["status"] for item in items)
    bad = sum(counts[status] for status in DONE_BADLY)
    status = "failed" if bad else "incomplete" if problem else "passed" if counts["passed"] else "skipped"
    return {"status": status, "summary": dict(counts), "items": items, **({"reason": problem} if problem else {})}


def start(command: list[str], output: int | IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that `stop` ends what it starts too."""
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _watch(process: subprocess.Popen[bytes], path: Path, deadline: float, item_seconds: float) -> str:
    """Wait for the process to end. What has become of the item that it was at, if it was at one: crashed with its
    process, hung, or skipped because the stage's time is over."""

    def size() -> int:
        return path.stat().st_size if path.exists() else 0

    before, moved, patience = size(), time.monotonic(), max(STARTUP_SECONDS, item_seconds)
    while process.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        if size() != before:
            before, moved, patience = size(), now, item_seconds
        if now > deadline or now - moved > patience:
            stop(process)
            return "skipped" if now > deadline else "hung"
    return "crashed"


def drive(
    command: list[str],
    path: Path,
    *,
    deadline: float,
    item_seconds: float = ITEM_SECONDS,
    environment: dict[str, str] | None = None,
    good_codes: tuple[int, ...] = (0,),
) -> tuple[list[Item], str | None]:
    """Run a worker until all its items are done: (items, why some are missing). `command` writes to `path`."""
    output = path.with_suffix(".log")
    while True:
        before = read(path)
        with output.open("ab") as log:
            process = start(command, log, environment or {})
            try:
                status = _watch(process, path, deadline, item_seconds)
            except BaseException:
                stop(process)
                raise
        told = output.read_bytes()[-1000:].decode(errors="replace").strip()
        ended = f"ended with code {process.returncode}: {told}" if status == "crashed" else status
        for name, item in read(path).items():
            if item["status"] == STARTED:
                write(path, name, status, reason="out of time" if status == "skipped" else f"its process {ended}")
        items = read(path)
        if status == "skipped":
            return [*items.values()], "out of time"
        if status == "crashed" and process.returncode in good_codes:
            return [*items.values()], None
        if len(items) == len(before):
            return [*items.values()], f"the worker {ended}"


@dataclass
class Run:
    """What the stages share: where results go and how much time is left."""

    out: Path
    work: Path  # records and logs while it runs
    dry: bool
    rows: str  # a pattern of row names
    began: float  # time.monotonic(), as the two below
    end: float  # when everything has to be over
    deadline: float = 0.0  # of the stage that runs
    results: dict[str, Stage] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes of one stage that share the device; each has a context of about half a gigabyte."""
        return 1 if self.dry else max(2, min(8, (os.cpu_count() or 2) // 2))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def worker(self, stage: str) -> Stage:
        """A stage of worker.py, in a process of its own."""
        record = self.work / f"{stage}.jsonl"
        command = [sys.executable, "-m", "bench.gpu_suite.worker", stage, str(record), "--rows", self.rows]
        return summarize(*drive(command, record, deadline=self.deadline))

    def command(self, words: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
        """(exit code, or None when its time is over, output) of a command within the stage's time."""
        seconds = min(seconds, self.deadline - time.monotonic())
        if seconds < 1:
            return None, ""
        process = start(words, subprocess.PIPE, environment)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return None, (process.stdout.read() if process.stdout else b"").decode(errors="replace")
        return process.returncode, output.decode(errors="replace")

    def python(self, program: str, seconds: float) -> tuple[Any, str]:
        """What a Python program prints as JSON behind the word FOUND, or None; and its exit code and output as text."""
        code, output = self.command([sys.executable, "-c", program], seconds)
        found = [line[6:] for line in output.splitlines() if line.startswith("FOUND ")]
        return json.loads(found[-1]) if found else None, f"exit code {code}: {output.strip()}"
