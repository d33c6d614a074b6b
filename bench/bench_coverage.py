"""coverage_sample on the sizes of LLaVA-1.5 and LLaVA-NeXT against the loop of SCOPE, restated from its formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from tokenprune_kernels.quick.images import make_features

from .baselines_greedy import coverage as published
from .shapes import MODELS

over_kinds = pytest.mark.parametrize("kind", ["image", "gaussian"])
over_models = pytest.mark.parametrize("name", ["LLaVA-1.5-7B", "LLaVA-NeXT-7B"])


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


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
