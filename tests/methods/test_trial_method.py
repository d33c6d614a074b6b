"""A method that is added to the package in two files is everywhere: in the integration, demo, benchmarks and tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testing import ROOT
from tokenprune_kernels.methods import method_names

TRIAL = '''"""A method that came later."""

from torch import Tensor

from ..ops import select_topk
from ._common import Selection, check_count
from ._method import Method, Stage


def trial(features: Tensor, k: int, *, mask: Tensor | None = None, backend: str | None = None) -> Selection:
    """The longest.

    >>> import torch
    >>> from tokenprune_kernels.methods import trial
    >>> trial(torch.tensor([[[1.0], [3.0], [2.0]]]), 2).indices
    tensor([[1, 2]])
    """
    check_count("trial", k)
    length = features.detach().float().square().sum(-1)
    indices, counts = select_topk(length, k, mask=mask, backend=backend)
    return Selection(indices, counts, {"length": length})


TRIAL = Method("trial", (Stage(trial, "model"),), title="Trial", summary="the longest", paper="2601.00001")
'''
LISTS = """
from tokenprune_kernels.integrations.transformers import METHODS
from tokenprune_kernels.demo.options import parse_methods
from studies.retention.measure import runs
print(*METHODS)
print(*parse_methods("all"))
print(*dict.fromkeys(run.method for run in runs()))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with one more method."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("tokenprune_kernels", "python_ref", "testing", "tests", "bench", "studies"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "models", "reference", "*.so")
        )
    for library in (ROOT / "tokenprune_kernels").glob("*.so"):
        (root / "tokenprune_kernels" / library.name).symlink_to(library)
    (root / "tokenprune_kernels" / "reference").symlink_to(root / "python_ref")  # what an installation maps
    shutil.copy(ROOT / "pyproject.toml", root)
    folder = root / "tokenprune_kernels" / "methods"
    (folder / "trial.py").write_text(TRIAL)
    text = (folder / "__init__.py").read_text()
    for old, new in (
        ("from .zspaprune import", "from .trial import TRIAL, trial\nfrom .zspaprune import"),
        ('    "unregister_method",\n', '    "trial",\n    "unregister_method",\n'),
        ("):\n    add(_method)", ", TRIAL):\n    add(_method)"),
    ):
        assert text.count(old) == 1, f"{old!r} is not once in methods/__init__.py"
        text = text.replace(old, new)
    (folder / "__init__.py").write_text(text)
    return root


def run(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_in_every_list(copy: Path) -> None:
    for module in ("transformers", "PIL", "rich", "sklearn", "skimage", "tqdm"):
        pytest.importorskip(module, reason=f"{module}, which the demo or the study imports, is not installed")
    names = [*method_names(), "trial"]
    assert run(copy, "-c", LISTS).splitlines() == [" ".join(names)] * 3
    assert f"all, or some of {', '.join(names)}, joined by commas" in " ".join(
        run(copy, "-m", "tokenprune_kernels", "demo", "-h").split()
    )


def test_it_has_a_row_in_the_benchmarks(copy: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    found = run(copy, "-m", "pytest", "--collect-only", "-q", "bench/bench_methods.py")
    assert found.count("[trial-") == found.count("[divprune-") > 0


def test_the_contract_tests_run_over_it_and_pass(copy: Path) -> None:
    contract = ("-m", "pytest", "-q", "tests/methods/test_contract.py")
    run(copy, *contract, "-k", "trial or covered")
    found = run(copy, *contract, "--collect-only")
    assert found.count("trial]") == found.count("divprune]") > 7
