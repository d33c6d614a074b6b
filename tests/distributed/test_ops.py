"""Every op on DTensors, in 2 and in 4 processes: what op_cases.py says of each case."""

from pathlib import Path

import pytest
import torch

from testing import ROOT, sharding_table
from testing.pages import section
from tests.distributed import op_cases, ranks
from tokenprune_kernels.distributed import merge_entropy, merge_lse

WORLDS = (2, 4)
Errors = dict[tuple[int, str], list[str]]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    return ranks.results("tests.distributed.op_cases", Path(tmp_path_factory.mktemp("ranks")), *WORLDS)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", op_cases.CASES)
def test_sharded(errors: Errors, case: str, world: int) -> None:
    assert not errors[world, case], "\n".join(errors[world, case])


def test_the_page_shows_what_the_descriptions_say() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert section(page, "shardings") == sharding_table.shardings(), "run: python -m scripts.update_readme"


def rows(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2, 3, 4, 24] in float64, and which of them are seen: of one row nothing, of others not every part."""
    draw = torch.Generator().manual_seed(5)
    logits = scale * torch.randn(2, 3, 4, 24, generator=draw, dtype=torch.float64)
    seen = torch.rand(logits.shape, generator=draw) > 0.3
    seen[0, 0, 0] = False
    seen[0, 0, 1, :8] = False
    seen[0, 0, 2, 1:] = False
    return logits, seen


def entropy_and_lse(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the last dimension: H = -sum P log P."""
    log_p = logits.log_softmax(-1).nan_to_num(-torch.inf)
    return torch.where(log_p == -torch.inf, 0.0, -log_p.exp() * log_p).sum(-1), logits.logsumexp(-1)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dim", [0, -1])
def test_merged_parts_are_the_whole(scale: float, dim: int) -> None:
    logits, seen = rows(scale)
    logits = logits.masked_fill(~seen, -torch.inf)
    want_entropy, want_lse = entropy_and_lse(logits)
    parts = [entropy_and_lse(part) for part in logits.split([8, 1, 15], -1)]
    entropy, lse = (torch.stack(each, dim) for each in zip(*parts, strict=True))
    merged = merge_entropy(entropy, lse, dim)
    torch.testing.assert_close(merge_lse(lse, dim), want_lse, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(merged, want_entropy, rtol=1e-12, atol=1e-12)
    assert merged[0, 0, 0] == 0
    assert merge_lse(lse, dim)[0, 0, 0] == -torch.inf


def test_merged_entropy_cancels_nothing() -> None:
    """Logits of a million: in float32, sum P s is known to no more than 0.06."""
    entropy, lse = torch.tensor([[0.5], [0.25]]), torch.tensor([[1e6], [1e6 - 20]])
    want = merge_entropy(entropy.double(), lse.double())
    torch.testing.assert_close(merge_entropy(entropy, lse).double(), want, rtol=1e-6, atol=0)
