"""Whole methods, from tensors to kept indices: through our ops, and through the eager references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenprune_kernels as tp

from .method_calls import STAGES, calls, inputs
from .shapes import MODELS

CASES = ("LLaVA-1.5-7B", "Qwen2.5-VL-7B@4096")


def same_selection(results: dict[str, Any]) -> None:
    assert torch.equal(results["ours"].indices, results["eager reference"].indices)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", STAGES)
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
