"""A method that is added to the package in two files is everywhere: in the integration, demo, benchmarks and tests."""

from pathlib import Path

import pytest

from testing import scratch
from tokenprune_kernels.methods import method_names

TRIAL = '''"""A method that came later."""

from torch import Tensor

from .._op import Budget
from ..ops import select_topk
from ._calls import called_like_ops
from ._common import Selection, check_count
from ._method import Method, Stage


@called_like_ops
def trial(features: Tensor, k: Budget, *, mask: Tensor | None = None, backend: str | None = None) -> Selection:
    """The longest.

    >>> import torch
    >>> from tokenprune_kernels.methods import trial
    >>> trial(torch.tensor([[[1.0], [3.0], [2.0]]]), 2).indices
    tensor([[1, 2]])
    """
    k = check_count("trial", k)
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
    root = scratch.checkout(tmp_path_factory.mktemp("checkout"))
    folder = root / "tokenprune_kernels" / "methods"
    (folder / "trial.py").write_text(TRIAL)
    scratch.edit(
        folder / "__init__.py",
        (
            ("from .zspaprune import", "from .trial import TRIAL, trial\nfrom .zspaprune import"),
            ('    "unregister_method",\n', '    "trial",\n    "unregister_method",\n'),
            ("):\n    add(_method)", ", TRIAL):\n    add(_method)"),
        ),
    )
    return root


def test_it_is_in_every_list(copy: Path) -> None:
    for module in ("transformers", "PIL", "rich", "sklearn", "skimage", "tqdm"):
        pytest.importorskip(module, reason=f"{module}, which the demo or the study imports, is not installed")
    names = [*method_names(), "trial"]
    assert scratch.run(copy, "-c", LISTS).splitlines() == [" ".join(names)] * 3
    assert f"all, or some of {', '.join(names)}, joined by commas" in " ".join(
        scratch.run(copy, "-m", "tokenprune_kernels", "demo", "-h").split()
    )


def test_it_has_a_row_in_the_benchmarks(copy: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    found = scratch.pytest(copy, "--collect-only", "bench/bench_rows.py")
    assert found.count("[trial, ") == found.count("[divprune, ") > 0


def test_the_contract_tests_run_over_it_and_pass(copy: Path) -> None:
    contract = "tests/methods/test_contract.py"
    scratch.pytest(copy, contract, "-k", "trial or covered")
    found = scratch.pytest(copy, contract, "--collect-only")
    assert found.count("trial]") == found.count("divprune]") > 7
