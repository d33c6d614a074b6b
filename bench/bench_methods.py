"""Whole methods, from tensors to kept indices: through our ops, and through the eager references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from tokenprune_kernels import methods

from .shapes import MODELS, Model

CASES = ("LLaVA-1.5-7B", "Qwen2.5-VL-7B@4096")


def smooth_features(model: Model, width: int, generator: torch.Generator) -> Tensor:
    """Visual tokens as redundant as real ones: a smooth random field over each crop plus noise, [1, N, width]."""
    crop_tokens = model.tokens // model.crops
    rows, columns = model.grid
    coarse = torch.randn(model.crops, width, max(rows // 4, 2), max(columns // 4, 2), generator=generator)
    field = torch.nn.functional.interpolate(coarse, (rows, columns), mode="bilinear", align_corners=True)
    tokens = field.flatten(2).mT[:, :crop_tokens].reshape(1, model.tokens, width)
    return tokens + 0.3 * torch.randn(tokens.shape, generator=generator)


def inputs(model: Model) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    rows, columns = model.grid
    cell = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    features = smooth_features(model, model.hidden, g)
    return {
        "query": torch.randn(1, model.query_heads, model.question, model.head_dim, generator=g),
        "key": torch.randn(1, model.key_heads, model.tokens, model.head_dim, generator=g),
        "features": features,
        "text": features[:, : model.question] + torch.randn(1, model.question, model.hidden, generator=g),
        "saliency": torch.rand(1, model.tokens, generator=g),
        "positions": cell.repeat(model.crops, 1).unsqueeze(0),
    }


def calls(model: Model, x: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    k = model.keep
    return {
        "coast": lambda: methods.coast(x["query"], x["key"], x["features"], k, causal=False),
        "sts_structure": lambda: methods.sts_structure(x["features"], k, positions=x["positions"]),
        "sts_semantics": lambda: methods.sts_semantics(x["query"], x["key"], k, causal=False),
        "adafv": lambda: methods.adafv(x["text"], x["features"], x["saliency"], k),
        "zspaprune": lambda: methods.zspaprune(x["text"], x["features"], k),
        "adaptprune": lambda: methods.adaptprune(
            x["query"], x["key"], x["features"], x["positions"], k, grid=model.grid, causal=False
        ),
        "fastv": lambda: methods.fastv(x["query"], x["key"], k, causal=False),
        "divprune": lambda: methods.divprune(x["features"], k),
    }


METHODS = ("coast", "sts_structure", "sts_semantics", "adafv", "zspaprune", "adaptprune", "fastv", "divprune")


def same_selection(results: dict[str, Any]) -> None:
    assert torch.equal(results["ours"].indices, results["eager reference"].indices)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_method(race: Callable[..., Any], name: str, method: str) -> None:
    model = MODELS[name]
    call = calls(model, inputs(model))[method]

    def reference() -> Any:
        with tp.use_backend("reference"):
            return call()

    race(
        f"{method}, {name}, {model.keep} of {model.tokens}",
        {"ours": call, "eager reference": reference},
        check=same_selection,
        seconds=3.0,
    )
