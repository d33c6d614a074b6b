"""The worker of the GPU suite: a crash, a hang or the end of the time costs one item, and nothing that was recorded."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_suite import correctness, work

WORKER = """
import bench.gpu_suite, os, sys, time
from pathlib import Path
from bench.gpu_suite import correctness, work
def wrong(): raise ValueError("wrong")
items = {
    "good": lambda: {"value": 1},
    "wrong": wrong,
    "crash": lambda: os.abort(),
    "hang": lambda: time.sleep(600),
    "last": lambda: None,
}
work.run_items(items, Path(sys.argv[1]), lambda: None if sys.argv[2] == "healthy" else "broken")
"""


def drive(record: Path, health: str, seconds: float = 600) -> tuple[dict[str, Any], str | None]:
    command = [sys.executable, "-c", WORKER, str(record), health]
    before, work.STARTUP_SECONDS = work.STARTUP_SECONDS, 120.0
    try:
        items, problem = work.drive(command, record, deadline=time.monotonic() + seconds, item_seconds=3)
    finally:
        work.STARTUP_SECONDS = before
    return {item["name"]: item for item in items}, problem


@pytest.mark.parametrize("health", ["healthy", "broken"])
def test_a_crash_or_a_hang_costs_one_item(tmp_path: Path, health: str) -> None:
    items, problem = drive(tmp_path / "record.jsonl", health)
    assert problem is None
    statuses = {name: item["status"] for name, item in items.items()}
    assert statuses == {"good": "passed", "wrong": "failed", "crash": "crashed", "hang": "hung", "last": "passed"}
    assert items["good"]["value"] == 1
    assert "ValueError: wrong" in items["wrong"]["reason"]
    assert str(-signal.SIGABRT) in items["crash"]["reason"]
    assert work.summarize(list(items.values()))["status"] == "failed"


def test_what_was_done_before_time_ran_out_is_kept(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    for name, status in (("crash", "crashed"), ("hang", "hung")):
        work.write(record, name, work.STARTED)
        work.write(record, name, status, reason="earlier")  # already tried: not again
    items, problem = drive(record, "healthy")
    assert problem is None
    assert items["crash"]["reason"] == "earlier"
    assert items["last"]["status"] == "passed"
    late = tmp_path / "late.jsonl"
    items, problem = drive(late, "healthy", seconds=0.2)
    assert problem == "out of time"


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    items, problem = work.drive(command, tmp_path / "r.jsonl", deadline=time.monotonic() + 60, item_seconds=5)
    assert items == []
    assert problem is not None
    assert "no such thing" in problem


def test_a_cut_off_line_of_a_record_is_ignored(tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    work.write(record, "a", work.STARTED)
    work.write(record, "a", "passed")
    with record.open("a") as file:
        file.write('\n{"name": "b')
    assert [(name, item["status"]) for name, item in work.read(record).items()] == [("a", "passed")]
    work.write(record, "c", "passed")  # the line behind it is whole
    assert list(work.read(record)) == ["a", "c"]


TESTS = """
import pytest, torch

def lost():
    raise RuntimeError("the device is lost")

torch.cuda.synchronize = lost
over_backends = pytest.mark.parametrize("backend", ["cpu", "gpu"])

@over_backends
def test_that_fails(backend): assert backend == "cpu"

@over_backends
def test_behind_it(backend): pass

def test_of_no_backend(): raise AssertionError("it is not run")
"""


def test_a_failure_that_loses_the_device_costs_one_test(tmp_path: Path) -> None:
    file, record = tmp_path / "test_two.py", tmp_path / "two.jsonl"
    file.write_text(TESTS)
    items, problem = work.drive(
        [sys.executable, *correctness.PYTEST, str(file)], record, deadline=time.monotonic() + 120,
        good_codes=correctness.PYTEST_RAN,
        environment={"TOKENPRUNE_RECORD": str(record), "TOKENPRUNE_TEST_BACKENDS": "gpu", "TOKENPRUNE_TEST_GPU": "0",
                     "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert problem is None
    assert [(item["name"].partition("::")[2], item["status"]) for item in items] == [
        ("test_that_fails[gpu]", "failed"), ("test_behind_it[gpu]", "passed"),
    ]  # fmt: skip
    assert "the device is unusable: the device is lost" in record.with_suffix(".log").read_text()
