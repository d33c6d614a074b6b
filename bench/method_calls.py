"""Whole methods on inputs of a model's size, for the benchmarks on every device."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune_kernels.methods import get_method, method_names

from .shapes import Model


def smooth_features(model: Model, width: int, generator: torch.Generator) -> Tensor:
    """Visual tokens as redundant as real ones: a smooth random field over each crop plus noise, [1, N, width]."""
    crop_tokens = model.tokens // model.crops
    rows, columns = model.grid
    coarse = torch.randn(model.crops, width, max(rows // 4, 2), max(columns // 4, 2), generator=generator)
    field = torch.nn.functional.interpolate(coarse, (rows, columns), mode="bilinear", align_corners=True)
    tokens = field.flatten(2).mT[:, :crop_tokens].reshape(1, model.tokens, width)
    return tokens + 0.3 * torch.randn(tokens.shape, generator=generator)


def inputs(model: Model, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
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


# A method that draws gives other tokens on every backend: nothing to compare.
STAGES = {
    stage.name: stage for name in method_names() for stage in get_method(name).stages if "generator" not in stage.uses
}


def calls(model: Model, x: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Each function of a method on what it asks for, as far as a prompt of visual tokens and a question has it."""
    given = {
        **x, "causal": False, "grid": model.grid, "visual_embeddings": x["features"], "unrotated_key": x["features"],
        "text_embeddings": x["text"], "input_features": x["features"], "input_text": x["text"],
        "stacked_positions": x["positions"], "next_query": x["query"], "next_key": x["key"],
    }  # fmt: skip
    # What a plain prompt leaves at its default, for methods that cannot do without.
    device = x["features"].device
    tokens, text = (torch.arange(n, device=device).unsqueeze(0) for n in (model.tokens, model.question))
    spare = {"groups": tokens // (model.tokens // model.crops), "key_indices": tokens, "query_positions": text}

    def arguments(stage: Any) -> dict[str, Any]:
        parameters = inspect.signature(stage.function).parameters
        known = given | {s: t for p, s in stage.arguments.items() if (t := spare.get(s)) is not None
                         and parameters[p].default is inspect.Parameter.empty}  # fmt: skip
        return {p: known[s] for p, s in stage.arguments.items() if s in known}

    return {name: partial(stage.function, k=model.keep, **arguments(stage)) for name, stage in STAGES.items()}
