"""The GPU suite without a GPU: a dry run through every stage, and the parts that decide what a result means."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_suite import ncu, report, sanitizer, tune
from bench.gpu_suite.__main__ import GROUPS, PARTS, STAGES
from bench.gpu_suite.build import ninja_command
from bench.gpu_suite.environment import find_program
from bench.gpu_suite.floors import ASSUMED, floor_seconds
from bench.rows import Scale, cpu_rows, gpu_rows, matching, nms, repulsion, short
from bench.rows.peers import PEERS, Peer, peers_of
from testing import ROOT
from testing.gpu_device import Host, UnavailableError, kernels_of

PAGE = ROOT / "docs" / "gpu.md"
COMMAND = [sys.executable, "-m", "bench.gpu_suite", "--dry-run"]


def run_suite(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, "--out", str(out), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    return done, json.loads((out / "results.json").read_text())


def test_a_dry_run_goes_through_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, results = run_suite(tmp_path)
    told = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, told
    *_, seconds = done.stdout.splitlines()
    with capsys.disabled():  # reported, not asserted: what else runs on this machine decides
        print(f"\ndry run: {seconds}")
    assert all(f"{name} {results['stages'][name]['seconds']:.0f} s" in seconds for name in STAGES)
    assert seconds.endswith(" s in all")
    assert results["schema"] == 3
    assert results["dry_run"] == "--dry-run"
    assert set(results["stages"]) == set(STAGES)
    for name, stage in results["stages"].items():
        assert stage["status"] == "passed", f"{name}: {stage.get('reason')}\n{told}"
    for item in results["stages"]["peers"]["items"]:
        assert item["status"] == "passed" or item["reason"].startswith("not run: "), item
    assert (tmp_path / "plans.csv").read_text().startswith("row,plan,us,planner's own us\n")
    facts = results["stages"]["environment"]["facts"]
    assert facts["torch"] == torch.__version__
    fields = set(re.findall(r"\w+", PAGE.read_text().partition("## results.json")[2]))
    for item in results["stages"]["timing"]["items"]:
        assert {*item, *item["row"], *item["times"]["ours"], *item["launches"]} - {"stand_in"} <= fields
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
    assert report.render(kept) == table
    assert "trace" not in json.dumps(kept)
    assert not kept["stages"]["correctness"]["items"]
    assert len(kept["stages"]["timing"]["items"]) == len(results["stages"]["timing"]["items"])


def test_a_stage_that_has_no_time_is_recorded_and_the_report_is_written(tmp_path: Path) -> None:
    done, results = run_suite(tmp_path, "--seconds", "14", "--only", "environment", "timing")
    assert results["stages"]["timing"]["status"] in ("incomplete", "skipped", "passed")
    assert (tmp_path / "report.md").exists()
    assert "environment" in done.stdout


def test_the_page_has_the_stages_with_their_parts_and_seconds() -> None:
    shown = re.findall(r"^\| (\w+) \| ([12, ]+) \| .* \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    parts = {name: ", ".join(str(part) for part in PARTS if name in PARTS[part]) for name in STAGES}
    assert shown == [(name, parts[name], str(seconds)) for name, seconds in STAGES.items()]


def test_every_stage_is_in_one_group_and_one_part() -> None:
    names = [name for group in GROUPS for name in group]
    assert sorted(names) == sorted(STAGES)
    assert len(set(names)) == len(names)
    assert {*PARTS[1], *PARTS[2]} == set(STAGES)
    assert {*PARTS[1]} & {*PARTS[2]} == {"environment", "build"}
    assert names.index("correctness") < names.index("timing")


def test_rows_are_chosen_by_name(tmp_path: Path) -> None:
    _, results = run_suite(tmp_path, "--only", "behaviour", "--rows", "^select_(topk|mixture)")
    names = [item["name"] for item in results["stages"]["behaviour"]["items"]]
    assert len(names) == 3  # at toy sizes some rows are the same
    assert all(name.startswith(("select_topk", "select_mixture")) for name in names)
    words = "--dry-run --only behaviour --rows '^select_(topk|mixture)'"
    assert results["command"] == f"python -m bench.gpu_suite {words}"


def test_rows_of_the_cpu_have_names_of_their_own_and_something_to_compare_with() -> None:
    rows = cpu_rows()
    assert len({(row.name, row.busy) for row in rows}) == len(rows) > 100
    for row in rows:
        assert set(row.targets) <= set(row.others), row.name
        assert row.agree is not None
        assert set(row.others) - set(row.unlike), row.name


def test_real_rows_have_names_of_their_own_and_floors() -> None:
    rows = gpu_rows(Scale(toy=False))
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert set(row.targets) <= {*row.others, *(peer.name for peer in peers_of(row.name))}, row.name
        assert row.check is not None
        assert ASSUMED["launch"] <= floor_seconds(row.bytes, row.flops, short(row.dtype), ASSUMED) < 1e-3, row.name


def test_rows_promise_no_fewer_launches_than_there_are() -> None:
    device = Host()
    if device.no_emulator is not None:
        pytest.skip(f"launches are counted on the emulator: {device.no_emulator}")
    made = {}
    for row in gpu_rows(Scale(toy=True)):
        if row.max_launches is not None:
            ours = device.serve(row.ours, *row.ops)
            kernels = device.launches(partial(ours, row.make(device.torch_device, 0)))["kernels"]
            made[row.name] = (kernels, row.max_launches)
    assert len(made) > 8
    assert not {name: counts for name, counts in made.items() if counts[0] > counts[1]}


# --- plans, kernels, peers ------------------------------------------------------------------------------------------


def test_every_choice_of_the_planners_is_swept() -> None:
    device = Host()
    if device.no_emulator is not None:
        pytest.skip(f"the emulator knows the names: {device.no_emulator}")
    import emulator

    assert list(tune.SWEEPS) == emulator.load().PLANNED
    rows = gpu_rows(Scale(toy=False))
    for name, (ops, values) in tune.SWEEPS.items():
        assert any(set(row.ops) & set(ops) for row in rows), name
        assert len(set(values)) == len(values) > 1


def test_tuning_keeps_the_fastest_plan_and_leaves_no_override_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    row = matching(gpu_rows(Scale(toy=True)), "^select_topk 1x")[0]
    device, plans = Host(emulate=False), [""]
    monkeypatch.setattr(device, "set_plan", plans.append)
    took = {"": 10.0, "select.cluster=2": 8.0, "select.cluster=2,select.threads=64": 7.9}
    monkeypatch.setattr(tune, "measure", lambda *_: {"events": {"median": took.get(plans[-1], 9.0)}})
    found = tune.tune(device, row, 0.0)
    assert (found["own_us"], found["best_us"], found["best"]) == (10.0, 8.0, "select.cluster=2")
    assert plans[-1] == ""
    assert f'"{row.name}","select.cluster=2",8.00,10.00' in tune.table([{"name": row.name, **found}])


def test_a_plan_with_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    row = matching(gpu_rows(Scale(toy=True)), "^select_topk 1x")[0]
    device = Host(emulate=False)
    right = row.ours
    row.ours = lambda x: tuple(t.flip(-1) for t in right(x)) if plans[-1] else right(x)
    plans = [""]
    monkeypatch.setattr(device, "set_plan", plans.append)
    with pytest.raises(AssertionError, match="elements differ"):
        tune.tune(device, row, 0.0)
    assert plans[-1] == ""


def test_kernels_of_a_trace() -> None:
    def event(name: str, cat: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "args": args}

    launch = {"grid": [4, 1, 1], "block": [128, 1, 1], "registers per thread": 40, "shared memory": 1024}
    events = [
        {"ph": "M", "name": "process_name"},
        event("tokenprune_region", "user_annotation", 0, 100),
        event("tokenprune_region", "gpu_user_annotation", 0, 300),
        *(event("rows", "kernel", 10 + 20 * call, 2.0 + call, **launch) for call in range(3)),
        *(event("columns", "kernel", 15 + 20 * call, 5.0, **launch) for call in range(3)),
        *(event("Memset (Device)", "gpu_memset", 5 + 20 * call, 1.0) for call in range(3)),
        event("cudaStreamSynchronize", "cuda_runtime", 50, 1.0),
        event("cudaDeviceSynchronize", "cuda_runtime", 200, 1.0),
    ]
    found = kernels_of({"traceEvents": events}, 3)
    assert (found["kernels"], found["copies_and_fills"], found["synchronizations"]) == (2, 1, 1)
    assert [(k["kernel"], k["us"], k["grid"], k["registers"]) for k in found["plan"]] == [
        ("rows", 3.0, [4, 1, 1], 40), ("columns", 5.0, [4, 1, 1], 40),
    ]  # fmt: skip
    uneven = kernels_of({"traceEvents": events[:-4]}, 4)
    assert uneven["kernels"] == 1.5
    assert "plan" not in uneven


def test_ncu_looks_at_kernels_that_run() -> None:
    """Every row is in the table and launches a kernel of that name; toy sizes have the same kernels."""
    device = Host()
    if device.no_emulator is not None:
        pytest.skip(f"launches are counted on the emulator: {device.no_emulator}")
    real, toys = gpu_rows(Scale(toy=False)), gpu_rows(Scale(toy=True))
    assert len(ncu.KERNELS) == 6
    for pattern, kernel in ncu.KERNELS:
        (row,) = matching(real, pattern)
        toy = toys[real.index(row)]
        ours = device.serve(toy.ours, *toy.ops)
        made = device.launches(partial(ours, toy.make(device.torch_device, 0)))["plan"]
        assert any(re.search(kernel, launch["kernel"]) for launch in made), (pattern, [m["kernel"] for m in made])


def test_metrics_of_ncu() -> None:
    output = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","k","GPU Speed Of Light Throughput","Duration","us","35.1"\n'
        '"0","k","Occupancy","Achieved Occupancy","%","48.2"\n'
    )
    assert ncu.metrics(output) == {
        "GPU Speed Of Light Throughput: Duration [us]": "35.1",
        "Occupancy: Achieved Occupancy [%]": "48.2",
    }
    assert ncu.metrics("==ERROR== no counters\n") == {}
    words = ncu.command("ncu", "lists_kernel")
    assert words[words.index("--clock-control") + 1] == "none"


def test_a_peer_that_is_missing_or_unknown_says_so() -> None:
    with pytest.raises(UnavailableError, match="not run: no_such_module cannot be imported"):
        Peer("x", "", "no_such_module", lambda module, x: x["y"]).load()
    other = Peer("x", "", "math", lambda module, x: module.no_such_function(x)).load()
    with pytest.raises(UnavailableError, match="not run: math is called otherwise than we know"):
        other({})
    rows = gpu_rows(Scale(toy=False))
    assert all(matching(rows, peer.rows) for peer in PEERS)


def test_column_sums_by_two_flex_attentions() -> None:
    """The arithmetic of the peer, with flex_attention's definition in place of its kernel."""
    from bench.rows import peers

    class Plain:
        @staticmethod
        def flex_attention(q: Any, k: Any, v: Any, score_mod: Any = None, return_lse: bool = False) -> Any:
            s = q @ k.mT / q.shape[-1] ** 0.5
            if score_mod is not None:
                b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in s.shape), indexing="ij")
                s = score_mod(s, b, h, i, j)
            return s.softmax(-1) @ v, s.logsumexp(-1)

    row = matching(gpu_rows(Scale(toy=True)), "^scores Qwen")[0]
    x = {name: t.float() for name, t in row.make(torch.device("cpu"), 0).items()}
    want = row.others["reference"](x)[0]
    torch.testing.assert_close(peers.flex_twice(Plain, x).view_as(want), want)


# --- what a result means --------------------------------------------------------------------------------------------


def test_verdicts_of_the_sanitizer() -> None:
    clean = "SAMPLE x\nALL SAMPLES DONE\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.verdict(0, clean)["status"] == "passed"
    found = sanitizer.verdict(86, "SAMPLE a-b\n========= Invalid __global__ write of size 4\n")
    assert found["status"] == "failed"
    assert found["reports"] == ["a-b: Invalid __global__ write of size 4"]
    assert sanitizer.verdict(0, "SAMPLE x\n")["status"] == "failed"  # it never came to the end
    assert sanitizer.verdict(1, "Traceback")["status"] == "failed"
    assert sanitizer.verdict(None, "")["status"] == "skipped"
    assert sanitizer.verdict(1, "========= Error: Device not supported")["status"] == "skipped"
    assert sanitizer.verdict(86, "", planted=True)["status"] == "passed"
    assert sanitizer.verdict(0, "no hazards", planted=True)["status"] == "failed"


def test_replays_find_a_pick_that_is_not_the_best() -> None:
    import tokenprune_kernels as tp

    torch.manual_seed(0)
    features = torch.randn(1, 40, 16)
    picks = tp.reference.repulsion_sample(features, 9)[0][0]
    assert repulsion.replay_max_min(features[0], picks) < 1e-6
    assert repulsion.replay_max_min(features[0], picks[[0, 2, 1, *range(3, 9)]]) > 1e-4
    with pytest.raises(AssertionError, match="twice"):
        repulsion.replay_max_min(features[0], picks[[0, 0, 1]])
    points = torch.rand(1, 40, 3)
    options: dict[str, Any] = {"potential": "riesz", "feature_weight": 0.0, "first": "index", "epsilon": 1e-12}
    picks = tp.reference.repulsion_sample(torch.ones(1, 40, 1), 9, positions=points, **options)[0][0]
    assert repulsion.replay_points(points[0], picks) < 1e-5
    assert repulsion.replay_points(points[0], picks[[0, 3, *range(4, 9)]]) > 1e-4
    x = {"scores": torch.rand(1, 40), "features": features, "positions": torch.rand(1, 40, 2) * 6}
    picks = tp.reference.spatial_semantic_nms(**x, k=9)[0][0]
    assert nms.replay_nms(x, picks) < 1e-5
    assert nms.replay_nms(x, picks.flip(0)) > 1e-4


def timing_item(median: float, **changed: Any) -> dict[str, Any]:
    row = {"bytes": 4.3e6, "flops": 0.0, "dtype": "float32", "targets": {"eager": 5.0}, "max_launches": 2,
           "max_microseconds": None, "min_floor_share": 0.5, "max_bytes": 100}  # fmt: skip
    times = {"ours": {"graph": {"median": median, "p10": median, "p90": median}, "peak_bytes": 101}}
    return {
        "name": "x",
        "row": {**row, **changed},
        "times": times,
        "ratios": {"eager": 6.0},
        "launches": {"kernels": 3},
    }


def test_promises_are_compared_with_what_came_out() -> None:
    met = {v["promise"]: v["met"] for v in report.verdicts(timing_item(5.0), ASSUMED)}
    assert met == {
        "times faster than eager": True, "launches": False, "share of the floor": True, "bytes held": False,
    }  # fmt: skip
    slow = {v["promise"]: v["met"] for v in report.verdicts(timing_item(50.0), ASSUMED)}
    assert slow["share of the floor"] is False
    unknown = {v["promise"]: v["met"] for v in report.verdicts(timing_item(5.0), None)}
    assert unknown["share of the floor"] is None


def test_the_build_here_asks_for_this_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_program("nvcc") is None:
        pytest.skip("no nvcc to write a ninja file for")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    try:
        command = ninja_command(tmp_path / "build")
    except SystemExit as error:
        pytest.skip(str(error))
    assert str(tmp_path / "build") in command
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "rule cxx" in rules
    assert re.findall(r",code=(\w+)", rules) == ["sm_90a"]
    assert "TOKENPRUNE_CUDA" not in os.environ


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
