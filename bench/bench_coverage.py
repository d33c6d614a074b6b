"""coverage_sample on the sizes of LLaVA-1.5 and LLaVA-NeXT against the loop of SCOPE, restated from its formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp

from .images import make_features
from .shapes import MODELS

over_kinds = pytest.mark.parametrize("kind", ["image", "gaussian"])
over_models = pytest.mark.parametrize("name", ["LLaVA-1.5-7B", "LLaVA-NeXT-7B"])


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def published(similarity: Tensor, quality: Tensor, k: int) -> Tensor:
    """The gains of all tokens over all rows anew in every step."""
    batch, rows, _ = similarity.shape
    sample = torch.arange(batch, device=similarity.device)
    covered, taken = similarity.new_zeros(batch, rows, 1), torch.zeros_like(quality, dtype=torch.bool)
    picks = torch.empty(batch, k, dtype=torch.int64, device=similarity.device)
    for step in range(k):
        gain = (similarity - covered).clamp_min(0).sum(1) * quality
        j = gain.masked_fill(taken, -torch.inf).argmax(-1)
        picks[:, step] = j
        taken[sample, j] = True
        covered = torch.maximum(covered, similarity[sample, :, j].unsqueeze(-1))
    return picks


def same_picks(results: dict[str, Tensor]) -> None:
    for name, picks in results.items():
        assert torch.equal(picks, results["ours"]), name


@over_kinds
@over_models
def test_saliency_times_coverage(race: Any, name: str, kind: str) -> None:
    model = MODELS[name]
    unit = torch.nn.functional.normalize(make_features(kind, model, model.vision_hidden), dim=-1)
    similarity, quality = unit @ unit.mT, torch.rand(1, model.tokens)
    race(
        f"coverage, {model.name}, {kind}, {model.tokens}x{model.tokens} -> {model.keep}",
        {
            "ours": lambda: tp.coverage_sample(similarity, model.keep, quality=quality)[0],
            "published loop": lambda: published(similarity, quality, model.keep),
        },
        check=same_picks,
        target=("published loop", 10.0),
        seconds=1.5,
    )
