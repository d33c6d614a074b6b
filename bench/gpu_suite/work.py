"""Named items that run one after the other in a process of their own, recorded as JSON lines.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testing import ROOT

BROKEN = 75  # exit code: the device is unusable in this process
DONE_BADLY = ("failed", "crashed", "hung")
STARTUP_SECONDS = 90.0  # importing torch and making a context, or compiling the emulator
Item = dict[str, Any]


class MissingError(Exception):
    """The op has no kernel in this build."""


class UnavailableError(Exception):
    """What the item needs is not there; the message says what."""


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; the last one may be cut off."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


class Record:
    """The worker's side of the record."""

    def __init__(self, path: Path) -> None:
        self.seen = {line["name"] for line in read(path)}
        self._file = path.open("a")

    def write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def start(self, name: str) -> None:
        self.write(name=name, event="start")

    def finish(self, name: str, status: str, **detail: Any) -> None:
        self.write(name=name, event="end", status=status, **detail)


def last_lines(error: BaseException, count: int = 12) -> str:
    return "".join(traceback.format_exception(error)).strip()[-200 * count :]


def run_items(items: dict[str, Callable[[], Item | None]], path: Path, broken: Callable[[], str | None]) -> None:
    """Run what the record does not have yet. Exits with BROKEN when the device did not survive an item."""
    record = Record(path)
    for name, run in items.items():
        if name in record.seen:
            continue
        record.start(name)
        began = time.monotonic()
        detail: Item = {}
        try:
            detail = run() or {}
            status = detail.pop("status", "passed")
        except MissingError as error:
            status, detail = "missing", {"reason": str(error)}
        except UnavailableError as error:
            status, detail = "skipped", {"reason": str(error)}
        except Exception as error:
            status, detail = "failed", {"reason": f"{type(error).__name__}: {error}"[:2000], "trace": last_lines(error)}
        record.finish(name, status, took=round(time.monotonic() - began, 4), **detail)
        if status == "failed" and (reason := broken()):
            print(f"the device is unusable after {name}: {reason}", flush=True)
            sys.exit(BROKEN)


def finished(path: Path) -> list[Item]:
    """The items of a record in order; the one that was started and never ended is `crashed`."""
    items: dict[str, Item] = {}
    for line in read(path):
        line = dict(line)
        if line.pop("event") == "start":
            items.setdefault(line["name"], {"name": line["name"], "status": "crashed"})
        else:
            items[line["name"]] = line
    return list(items.values())


def unfinished(path: Path) -> list[str]:
    """The items that were started and have not ended."""
    lines = read(path)
    ended = {line["name"] for line in lines if line["event"] == "end"}
    return [line["name"] for line in lines if line["name"] not in ended]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started in a session of its own, with what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _watch(process: subprocess.Popen[bytes], path: Path, deadline: float, item_seconds: float) -> str | None:
    """Wait for the process to end. The reason when it had to be stopped."""
    began, size = time.monotonic(), path.stat().st_size if path.exists() else 0
    moved, first = began, True
    while process.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        grown = path.stat().st_size if path.exists() else 0
        if grown != size:
            size, moved, first = grown, now, False
        if now > deadline:
            stop(process)
            return "cut off"
        if now - moved > (max(STARTUP_SECONDS, item_seconds) if first else item_seconds):
            stop(process)
            return "hung"
    return None


def drive(
    command: list[str],
    path: Path,
    *,
    deadline: float,
    item_seconds: float,
    environment: dict[str, str] | None = None,
    good_codes: tuple[int, ...] = (0,),
) -> tuple[list[Item], str | None]:
    """Run a worker until all its items are done: (items, why some are missing). `command` writes to `path`."""
    output = path.with_suffix(".log")
    while True:
        before = len(read(path))
        with output.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                reason = _watch(process, path, deadline, item_seconds)
            except BaseException:
                stop(process)
                raise
        for name in unfinished(path):
            why = reason or f"its process ended with code {process.returncode}: {tail(output, 300)}"
            status = {"hung": "hung", "cut off": "skipped", None: "crashed"}[reason]
            Record(path).finish(name, status, reason=why if reason != "cut off" else "out of time")
        if reason == "cut off":
            return finished(path), "out of time"
        if process.returncode in good_codes:
            return finished(path), None
        if len(read(path)) == before:
            return finished(path), f"the worker {reason or f'ended with code {process.returncode}'}: {tail(output)}"


def tail(path: Path, size: int = 2000) -> str:
    return path.read_bytes()[-size:].decode(errors="replace").strip() if path.exists() else ""
