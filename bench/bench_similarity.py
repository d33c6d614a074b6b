"""The cosine ops against the reference (normalise, one matrix product, reduce) and torch.cosine_similarity."""

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_paired(race: Race, dtype: str) -> None:
    """EVS on a video of Qwen2.5-VL: each token against the same one a frame earlier, both views of one tensor."""
    torch.manual_seed(0)
    video = torch.randn(33, 196, MODELS["Qwen2.5-VL-7B@4096"].hidden).to(DTYPES[dtype])
    copy = torch.empty_like(video[1:])

    def check(results: dict[str, Any]) -> None:
        wide = video.double()
        exact = torch.nn.functional.cosine_similarity(wide[1:], wide[:-1], dim=-1)
        torch.testing.assert_close(results["ours"].double(), exact, rtol=0, atol=2e-6)
        torch.testing.assert_close(
            results["torch.cosine_similarity"].double(), exact, rtol=0, atol=2e-6 if dtype == "float32" else 8e-3
        )

    race(
        f"paired cosine 32x196x{video.shape[-1]} {dtype}",
        {
            "ours": lambda: tp.paired_cosine(video[1:], video[:-1]),
            "torch.cosine_similarity": lambda: torch.nn.functional.cosine_similarity(video[1:], video[:-1], dim=-1),
            "copy of as many bytes": lambda: copy.copy_(video[1:]),
        },
        check=check,
        target=("torch.cosine_similarity", 2.0),
        seconds=2.0,
        note="a copy at the same rate would give 1.0, 70% of its rate 0.7",
    )
