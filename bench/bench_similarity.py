"""cosine_scores and contrastive_scores against the reference: normalise, one matrix product, reduce."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenprune_kernels as tp
from bench.shapes import MODELS

Race = Callable[..., dict[str, float]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def nearly_equal(results: dict[str, Any]) -> None:
    for scores in results.values():
        torch.testing.assert_close(scores, results["ours"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("m", "reduction"), [(1, "max"), (16, "max"), (64, "max"), (64, "mean")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["LLaVA-1.5-7B", "LLaVA-NeXT-7B"])
def test_cosine(race: Race, model: str, dtype: str, m: int, reduction: str) -> None:
    torch.manual_seed(0)
    n, channels = MODELS[model].tokens, MODELS[model].hidden
    features = torch.randn(1, n, channels).to(DTYPES[dtype])
    queries = torch.randn(1, m, channels).to(DTYPES[dtype])
    race(
        f"cosine {reduction} {n}x{channels} M{m} {dtype}",
        {
            "ours": lambda: tp.cosine_scores(features, queries, reduction=reduction),
            "reference": lambda: tp.reference.cosine_scores(features, queries, reduction=reduction),
        },
        check=nearly_equal,
        seconds=0.5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["LLaVA-1.5-7B", "LLaVA-NeXT-7B"])
def test_contrastive(race: Race, model: str, dtype: str) -> None:
    """COAST's numbers: 0.8 K anchors, a tenth of the tokens as references."""
    torch.manual_seed(0)
    shape = MODELS[model]
    features = torch.randn(1, shape.tokens, shape.hidden).to(DTYPES[dtype])
    order = torch.randperm(shape.tokens).unsqueeze(0)
    a, r = shape.keep * 4 // 5, shape.tokens // 10
    anchors, references = order[:, :a], order[:, a : a + r]
    race(
        f"contrastive {shape.tokens}x{shape.hidden} A{a} R{r} {dtype}",
        {
            "ours": lambda: tp.contrastive_scores(features, anchors, references),
            "reference": lambda: tp.reference.contrastive_scores(features, anchors, references),
        },
        check=nearly_equal,
        seconds=1.0,
    )
