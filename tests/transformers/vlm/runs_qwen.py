"""The Qwen models that several files of tests run, with their prompts: ragged images, and a video."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import models_qwen as qwen
from . import oracle
from .models import Prompts

KEEP = 0.4
# 32 + 12 visual tokens and 14 text tokens against 16 and 9: padding on the left, sizes and numbers of images differ.
RAGGED = [[3, (1, 8, 12), 2, (1, 4, 8), 2, ("video", (3, 4, 4)), 5], [2, (1, 8, 8), 4]]
# float32 against float64 through ten layers, logits up to 5: seen 2e-5.
CLOSE = {"rtol": 0.0, "atol": 4e-5}


@functools.cache
def model(name: str) -> Any:
    return qwen.model(name)


@functools.cache
def batch(name: str) -> Prompts:
    return qwen.prompts(model(name), RAGGED)


def generate(prompts: Prompts, new: int, **more: Any) -> tuple[Any, Tensor]:
    """What generate returns, and the new tokens."""
    given = {
        "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "return_dict_in_generate": True,
        "output_logits": True, "suppress_tokens": qwen.SPECIAL, **more,
    }  # fmt: skip
    with torch.no_grad():
        out = prompts.model.generate(**prompts.inputs, **given)
    return out, out.sequences[:, prompts.inputs["input_ids"].shape[1] :]


def exact(
    prompts: Prompts, pruning: Any, new: Tensor, compacted: bool = False,
    path: Callable[..., Tensor] = oracle.logits, **more: Any,
) -> Tensor:  # fmt: skip
    """[B, steps, vocabulary]: the float64 logits each of the new tokens was chosen by."""
    start = prompts.inputs["input_ids"].shape[1]
    drops = [
        oracle.Drop(layer, oracle.dropped_columns(prompts, kept), compacted) for layer, kept in pruning.kept_at.items()
    ]
    return path(prompts, drops, new[:, :-1], **more)[:, start - 1 :]


def greedy(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., qwen.SPECIAL] = -torch.inf
    logits[..., 1] = -torch.inf  # the end of the text, kept out by min_new_tokens
    return logits.argmax(-1)
