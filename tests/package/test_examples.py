"""The scripts of examples/ run and say what they should."""

import re
from importlib.util import find_spec

import pytest

import tokenprune_kernels as tp
from testing import ROOT
from testing.process import printed, search_path


def run(name: str) -> str:
    return printed(ROOT / "examples" / name, PYTHONPATH=search_path(ROOT))


def test_every_example_is_tested() -> None:
    scripts = {file.name for file in (ROOT / "examples").glob("*.py")}
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    assert [name for name in scripts if f'"{name}")' not in tests and f'"{name}",' not in tests] == []


def test_third_party_module() -> None:
    told = run("third_party_module.py")
    assert "kept [1, 128, 1024], count [128]" in told
    assert "compiled with fullgraph=True: equal" in told


def test_drop_in_selection() -> None:
    assert "same tokens kept: True" in run("drop_in_selection.py")


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; make check-vllm runs this example")
def test_vllm_offline() -> None:
    assert "134 tokens" in run("vllm_offline.py")


@pytest.mark.skipif(tp.config()["backends"]["cpu"] is not None, reason="the compiled library is not loaded")
def test_export_pruner() -> None:
    told = run("export_pruner.py")
    found = re.findall(r"(\d+) tokens.*first indices (\[.*\])", told)
    assert len(found) == 4
    there, here = dict(found[:2]), dict(found[2:])
    assert there == here
    assert "576 tokens: kept [1, 64, 256]" in told


def test_own_method() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("PIL", reason="Pillow is not installed")
    lines = run("own_method.py").splitlines()
    assert [line.rpartition(":")[0] for line in lines[1:]] == [
        *["outliers: 128 of 576 tokens"] * 3,
        "unlike_the_mean: 128 of 576 tokens",
    ]
    assert lines[1].rpartition(": ")[2] == lines[4].rpartition(": ")[2] != ""
