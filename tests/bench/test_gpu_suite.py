"""The GPU suite without a GPU: a dry run through every stage, and the parts that decide what a result means."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_suite import floors, report, rows_greedy, sanitizer, work
from bench.gpu_suite.__main__ import GROUPS, STAGES
from bench.gpu_suite.build import architecture, direct_command, settings
from bench.gpu_suite.costs import floor_seconds, predicted_rates
from bench.gpu_suite.device import Host
from bench.gpu_suite.rows import all_rows
from bench.gpu_suite.run import summarize
from testing import ROOT

COMMAND = [sys.executable, "-m", "bench.gpu_suite", "--dry-run"]


def run_suite(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, "--out", str(out), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    return done, json.loads((out / "results.json").read_text())


def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    done, results = run_suite(tmp_path)
    told = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, told
    assert results["schema"] == 1
    assert results["dry_run"] == "--dry-run"
    assert set(results["stages"]) == set(STAGES)
    for name, stage in results["stages"].items():
        assert stage["status"] == "passed", f"{name}: {stage.get('reason')}\n{told}"
    facts = results["stages"]["environment"]["facts"]
    assert facts["torch"]["torch"] == torch.__version__
    for item in results["stages"]["timing"]["items"]:
        if item["name"] == "peak memory of the scores":
            continue
        for function, times in item["times"].items():
            assert times["events"]["median"] > 0, f"{item['name']}: {function}: {times}"
        assert "graph" in item["times"]["ours"]
        assert all(ratio > 0 for ratio in item["ratios"].values())
    assert len(results["stages"]["timing"]["items"]) > 25
    tests = [item["name"] for item in results["stages"]["correctness"]["items"]]
    assert any("test_gpu.py::" in name for name in tests)
    assert any("test_contract.py::" in name and "gpu" in name for name in tests)
    table = (tmp_path / "report.md").read_text()
    assert report.NOT_A_MEASUREMENT in table
    refused = subprocess.run(
        [sys.executable, "-m", "bench.gpu_suite.report", str(tmp_path), "--save", str(tmp_path / "kept.json")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "a dry run has nothing worth keeping" in refused.stderr
    kept = report.kept(results)
    assert len(kept["rows"]) == len([i for s in ("timing", "compiled", "triton") for i in results["stages"][s]["items"]
                                     if "times" in i])  # fmt: skip
    assert "trace" not in json.dumps(kept)


def test_a_stage_that_has_no_time_is_recorded_and_the_report_is_written(tmp_path: Path) -> None:
    done, results = run_suite(tmp_path, "--seconds", "14", "--only", "environment", "timing")
    assert results["stages"]["timing"]["status"] in ("incomplete", "skipped", "passed")
    assert (tmp_path / "report.md").exists()
    assert "environment" in done.stdout


def test_every_stage_is_in_one_group() -> None:
    assert sorted(name for group in GROUPS for name in group) == sorted(STAGES)


def test_real_rows_have_names_of_their_own_and_floors() -> None:
    rows = all_rows(Host(emulate=False), toy=False)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert set(row.targets) <= {*row.others, "Flash-ColReduce"}, row.name
        floor = floor_seconds(row, predicted_rates())
        assert 0 <= floor["memory"] < 1e-3, row.name
        assert floor["floor"] < 1e-3, row.name


def test_rows_promise_no_fewer_launches_than_there_are() -> None:
    device = Host()
    if device.no_emulator is not None:
        pytest.skip(f"launches are counted on the emulator: {device.no_emulator}")
    made = {}
    for row in all_rows(device, toy=True):
        if row.max_launches is not None:
            kernels = device.launches(partial(row.ours, row.make(device.torch_device, 0)))["kernels"]
            made[row.name] = (kernels, row.max_launches)
    assert len(made) > 8
    assert not {name: counts for name, counts in made.items() if counts[0] > counts[1]}


def test_the_notes_have_the_predictions_of_every_row() -> None:
    """bench/NOTES.md holds what `python -m bench.gpu_suite.floors` prints."""
    notes = (ROOT / "bench" / "NOTES.md").read_text()
    for line in floors.lines():
        assert line in notes, line


# --- items in processes of their own --------------------------------------------------------------------------------

WORKER = """
import bench.gpu_suite, os, sys, time
from pathlib import Path
from bench.gpu_suite import work
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


def drive(record: Path, health: str, seconds: float = 60) -> tuple[dict[str, Any], str | None]:
    command = [sys.executable, "-c", WORKER, str(record), health]
    before, work.STARTUP_SECONDS = work.STARTUP_SECONDS, 30.0
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
    assert summarize(list(items.values()))["status"] == "failed"


def test_what_was_done_before_time_ran_out_is_kept(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    work.Record(record).write(name="crash", event="start")  # already tried: not again
    work.Record(record).finish("crash", "crashed", reason="earlier")
    work.Record(record).start("hang")
    work.Record(record).finish("hang", "hung", reason="earlier")
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
    record.write_text('{"name": "a", "event": "start"}\n{"name": "a", "event": "end", "status": "passed"}\n{"name": "b')
    assert [item["name"] for item in work.finished(record)] == ["a"]


# --- what a result means --------------------------------------------------------------------------------------------


def test_verdicts_of_the_sanitizer() -> None:
    clean = "SAMPLE x\nALL SAMPLES DONE\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.verdict("memcheck x", 0, clean, 1.0)["status"] == "passed"
    found = sanitizer.verdict("memcheck x", 86, "SAMPLE a-b\n========= Invalid __global__ write of size 4\n", 1.0)
    assert found["status"] == "failed"
    assert found["reports"] == ["a-b: Invalid __global__ write of size 4"]
    assert sanitizer.verdict("memcheck x", 0, "SAMPLE x\n", 1.0)["status"] == "failed"  # it never came to the end
    assert sanitizer.verdict("memcheck x", 1, "Traceback", 1.0)["status"] == "failed"
    assert sanitizer.verdict("memcheck x", None, "", 1.0)["status"] == "skipped"
    assert sanitizer.verdict("memcheck x", 1, "========= Error: Device not supported", 1.0)["status"] == "skipped"
    assert sanitizer.control_verdict("racecheck", 86, "")["status"] == "passed"
    assert sanitizer.control_verdict("racecheck", 0, "no hazards")["status"] == "failed"


def test_replays_find_a_pick_that_is_not_the_best() -> None:
    import tokenprune_kernels as tp

    torch.manual_seed(0)
    features = torch.randn(1, 40, 16)
    picks = tp.reference.repulsion_sample(features, 9)[0][0]
    assert rows_greedy.replay_max_min(features[0], picks) < 1e-6
    assert rows_greedy.replay_max_min(features[0], picks[[0, 2, 1, *range(3, 9)]]) > 1e-4
    with pytest.raises(AssertionError, match="twice"):
        rows_greedy.replay_max_min(features[0], picks[[0, 0, 1]])
    points = torch.rand(1, 40, 3)
    options: dict[str, Any] = {"potential": "riesz", "feature_weight": 0.0, "first": "index", "epsilon": 1e-12}
    picks = tp.reference.repulsion_sample(torch.ones(1, 40, 1), 9, positions=points, **options)[0][0]
    assert rows_greedy.replay_points(points[0], picks) < 1e-5
    assert rows_greedy.replay_points(points[0], picks[[0, 3, *range(4, 9)]]) > 1e-4
    x = {"scores": torch.rand(1, 40), "features": features, "positions": torch.rand(1, 40, 2) * 6}
    picks = tp.reference.spatial_semantic_nms(**x, k=9)[0][0]
    assert rows_greedy.replay_nms(x, picks) < 1e-5
    assert rows_greedy.replay_nms(x, picks.flip(0)) > 1e-4


def timing_item(median: float, **changed: Any) -> dict[str, Any]:
    row = {"bytes": 4.3e6, "flops": 0.0, "dtype": "float32", "targets": {"eager": 5.0}, "max_launches": 2,
           "max_microseconds": None, "min_floor_share": 0.5}  # fmt: skip
    times = {"ours": {"graph": {"median": median, "p10": median, "p90": median}}}
    return {
        "name": "x",
        "row": {**row, **changed},
        "times": times,
        "ratios": {"eager": 6.0},
        "launches": {"kernels": 3},
    }


def test_promises_are_compared_with_what_came_out() -> None:
    met = {v["promise"]: v["met"] for v in report.verdicts(timing_item(5.0), predicted_rates())}
    assert met == {"times faster than eager": True, "launches": False, "share of the floor": True}
    slow = {v["promise"]: v["met"] for v in report.verdicts(timing_item(50.0), predicted_rates())}
    assert slow["share of the floor"] is False
    unknown = {v["promise"]: v["met"] for v in report.verdicts(timing_item(5.0), None)}
    assert unknown["share of the floor"] is None


def test_the_build_here_asks_for_this_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "8.0",
        "8.9",
        "9.0a",
        "10.0",
        "12.0",
    ]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    chosen = settings("9.0a")
    assert chosen["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert chosen["MAX_JOBS"] == str(os.cpu_count())
    try:
        command = direct_command({**chosen, "TOKENPRUNE_CUDA": "0"}, tmp_path, tmp_path / "_C.abi3.so")
    except (RuntimeError, SystemExit) as error:
        pytest.skip(str(error))
    assert str(tmp_path) in command
    assert "rule cxx" in (tmp_path / "build.ninja").read_text()
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ


def test_a_bare_checkout_finds_its_references(tmp_path: Path) -> None:
    """Without an installation nothing maps tokenprune_kernels.reference to python_ref/."""
    program = "import bench.gpu_suite, tokenprune_kernels as tp; print(tp.reference.__file__)"
    folders = [p for p in sys.path if p and Path(p).resolve() != ROOT]
    # -S: site-packages' import hooks stay away, which would find the references of an editable installation.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "python_ref" / "__init__.py"
