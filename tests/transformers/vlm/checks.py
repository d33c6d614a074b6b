"""What the tests of pruned models share: greedy generation, what was dropped, and equality with the float64 path."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from testing.proofs import FOUR as FOUR
from tokenprune_kernels.integrations.transformers.pruning import IN_MODEL, METHODS
from tokenprune_kernels.methods import _registry, get_method

from . import oracle
from .models import IMAGE, Prompts

LAYER = 2  # of 4
ON_LAYOUT = [name for name in METHODS if get_method(name).uses & {"positions", "grid", "groups", "stacked_positions"}]
# Whose positions are numbered anew, of models whose positions are no grid's.
RENUMBERED = [name for name in METHODS if get_method(name).positions == "renumber"]
over_four = pytest.mark.parametrize("method", FOUR)
# Before the model there is nothing to compact.
over_four_and_compact = pytest.mark.parametrize(
    ("method", "compact"), [(m, c) for m in FOUR for c in (False, True) if not c or m in IN_MODEL]
)
# Logits are below 1; some roundings of float32, whatever is pruned.
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def spy_on(patch: pytest.MonkeyPatch, method: str, function: str, spy: Callable[..., Any]) -> None:
    """Blocks that are made from now on call `spy` in place of a function of the method, with the same arguments."""

    def spied(stage: Any) -> Any:
        return replace(stage, function=wraps(stage.function)(spy)) if stage.name == function else stage

    described = get_method(method)
    assert function in {stage.name for stage in described.stages}
    patch.setitem(_registry._METHODS, method, replace(described, stages=tuple(map(spied, described.stages))))


# What merges goes on with rows that no mask makes: beside masks it selects alone, and test_merging.py has the rest.
WITHOUT_MERGING: dict[str, dict[str, Any]] = {
    "visionzip": {"contextual_ratio": 0.0},
    "sparsevlm": {"recycle_ratio": None},
}


def options_of(method: str) -> dict[str, Any]:
    return {**({"layer": LAYER} if method in IN_MODEL else {}), **WITHOUT_MERGING.get(method, {})}


def generate(model: Any, inputs: dict[str, Tensor], steps: int, **more: Any) -> Any:
    """`sequences` and `logits` of generation that neither ends early nor writes an image token."""
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": steps, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**options, "suppress_tokens": [IMAGE], **more})


def drops_of(prompts: Prompts, pruning: Any, layer: int, compact: bool = False) -> list[oracle.Drop]:
    """What a block dropped in its last prefill. `layer`: where the method prunes inside the model; 0 before it."""
    at = dict(pruning.kept_at) or {layer: pruning.kept}
    return [oracle.Drop(first, oracle.dropped_columns(prompts, kept), compact) for first, kept in sorted(at.items())]


def assert_decoded_like_the_oracle(
    prompts: Prompts, drops: Sequence[oracle.Drop], out: Any, *, renumber: bool = False, close: Any = CLOSE
) -> None:
    """The logits of the prefill and of every decoding step, given the tokens that were decoded."""
    length = prompts.inputs["input_ids"].shape[1]
    new = out.sequences[:, length:]
    want = oracle.logits(prompts, drops, new[:, :-1], renumber=renumber)[:, length - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **close)
