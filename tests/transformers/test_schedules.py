"""Schedules: the same forward drops tokens in front of several decoder layers, each time from what is left."""

from typing import Any

import pytest
import torch

from tests.transformers import test_qwen
from tests.transformers.vlm import models_qwen
from tests.transformers.vlm.checks import (
    IN_MODEL,
    RENUMBERED,
    WITHOUT_MERGING,
    assert_decoded_like_the_oracle,
    drops_of,
    generate,
    options_of,
)
from tests.transformers.vlm.models import Prompts, llava
from tests.transformers.vlm.runs_crops import prompts_of
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

over_in_model = pytest.mark.parametrize("method", IN_MODEL)


@over_in_model
@pytest.mark.parametrize("compact", [False, True])
def test_three_prunings_and_32_decoded_tokens_equal_the_float64_path(method: str, compact: bool) -> None:
    prompts = llava(3, ragged=True)
    options = {"compact_cache": compact, **WITHOUT_MERGING.get(method, {})}
    with prune_visual_tokens(prompts.model, method, {1: 0.5, 2: 12, 3: 0.125}, **options) as pruning:
        out = generate(prompts.model, prompts.inputs, 32)
    counts = {layer: kept.shape[1] for layer, kept in pruning.kept_at.items()}
    assert counts == {1: 18, 2: 12, 3: 4}
    assert pruning.stats["layers"] == [1, 2, 3]
    if not compact:  # a cache of the length that each layer saw, and 31 tokens behind it
        length = prompts.inputs["input_ids"].shape[1]
        lengths = [out.past_key_values.layers[i].get_seq_length() - 31 for i in range(4)]
        assert lengths == [length, length - 18, length - 24, length - 32]
    drops = drops_of(prompts, pruning, 0, compact)
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=method in RENUMBERED)


SAMPLES: list[list[Any]] = [[3, (1, 8, 8), 6], [4, (1, 4, 8), 2, (1, 8, 4), 5]]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision", "internvl"])
def test_schedules_on_every_family_with_unequal_images(family: str) -> None:
    """Shares are of each sample's own tokens, mRoPE and DeepStack follow what is left."""
    if family.startswith("qwen"):
        prompts = models_qwen.prompts(models_qwen.model(family), SAMPLES)
    else:
        prompts = prompts_of(family, "several")
    with prune_visual_tokens(prompts.model, "coast", {1: 0.5, 3: 0.25}) as pruning:
        out = generate(prompts.model, prompts.inputs, 32, suppress_tokens=list(visual_ids(prompts)))
    before = pruning.stats["before"]
    for layer, share in ((1, 2), (3, 4)):
        assert (pruning.kept_at[layer] >= 0).sum(1).tolist() == [n // share for n in before]
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, 0), out, close=test_qwen.CLOSE)


def visual_ids(prompts: Prompts) -> tuple[int, ...]:
    return (prompts.visual,) if isinstance(prompts.visual, int) else prompts.visual


@over_in_model
def test_a_schedule_that_keeps_all_changes_no_bit(method: str) -> None:
    prompts = llava(3, ragged=True)
    plain = generate(prompts.model, prompts.inputs, 2)
    with prune_visual_tokens(prompts.model, method, {1: 1.0, 2: 36, 3: 1.0}) as pruning:
        out = generate(prompts.model, prompts.inputs, 2)
    for got, want in zip(out.logits, plain.logits, strict=True):
        assert torch.equal(got, want)
    assert pruning.stats["layers"] == []


@over_in_model
def test_a_schedule_of_one_layer_is_keep_at_that_layer(method: str) -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        want = generate(prompts.model, prompts.inputs, 3)
        kept = pruning.kept
    with prune_visual_tokens(prompts.model, method, {2: 9}, **WITHOUT_MERGING.get(method, {})) as pruning:
        out = generate(prompts.model, prompts.inputs, 3)
    assert torch.equal(pruning.kept, kept)
    assert torch.equal(torch.stack(out.logits), torch.stack(want.logits))


def test_each_pruning_scores_by_the_attention_of_the_layer_before_it() -> None:
    """What is left in front of a layer is what a block that begins there alone keeps of the same hidden states."""
    prompts = llava(1)
    seen = []

    def last_row(query: Any, key: Any, k: int, *, key_indices: Any, scale: Any, query_positions: Any) -> Any:
        chosen = methods.fastv(query, key, k, key_indices=key_indices, scale=scale, query_positions=query_positions)
        seen.append((key.shape[2], key_indices.shape[1], chosen.indices))
        return chosen

    with torch.no_grad(), prune_visual_tokens(prompts.model, last_row, {1: 0.5, 3: 0.25}) as pruning:
        prompts.model(**prompts.inputs)
    length = prompts.inputs["input_ids"].shape[1]
    assert [(keys, visual) for keys, visual, _ in seen] == [(length, 36), (length - 18, 18)]
    first, second = (pruning.kept_at[layer] for layer in (1, 3))
    assert torch.equal(first, seen[0][2])
    assert torch.equal(second, first.gather(1, seen[1][2]))


def test_the_stage_in_front_of_the_model_takes_its_share_of_the_first_layers_budget() -> None:
    prompts = llava(1)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "sts", {2: 10, 3: 4}) as pruning:
        prompts.model(**prompts.inputs)
    assert {layer: kept.shape[1] for layer, kept in pruning.kept_at.items()} == {0: 20, 2: 10, 3: 4}


def test_shares_are_rounded_down_as_they_are_written() -> None:
    """0.29 of 100 tokens is 28.999... in floating point."""
    prompts = prompts_of("llava_next", "single")
    with torch.no_grad(), prune_visual_tokens(prompts.model, "fastv", {1: 0.999, 2: 0.29}) as pruning:
        prompts.model(**prompts.inputs)
    (tokens,) = pruning.stats["before"]
    assert {layer: kept.shape[1] for layer, kept in pruning.kept_at.items()} == {1: tokens - 1, 2: tokens * 29 // 100}


@pytest.mark.parametrize(
    ("keep", "more", "error", "message"),
    [
        ({}, {}, ValueError, "names a layer at least"),
        ({0: 0.5}, {}, ValueError, r"layer must lie in \[1, 3\] for this model, got 0"),
        ({1: 0.5, 4: 0.25}, {}, ValueError, r"layer must lie in \[1, 3\] for this model, got 4"),
        ({True: 0.5}, {}, ValueError, "got True"),
        ({"1": 0.5}, {}, ValueError, "got '1'"),
        ({3: 0.5, 1: 0.25}, {}, ValueError, r"must ascend, got \[3, 1\]"),
        (
            {1: 0.25, 2: 0.5},
            {},
            ValueError,
            "must not grow .*, got 0.5 in front of layer 2 behind 0.25",
        ),
        ({1: 8, 2: 0.5, 3: 9}, {}, ValueError, "got 9 in front of layer 3 behind 8"),
        ({1: 0}, {}, ValueError, "at least 1 token"),
        ({1: 1.5}, {}, ValueError, r"\(0, 1\]"),
        ({1: "half"}, {}, TypeError, "got 'half'"),
        ({1: 0.5}, {"layer": 1}, ValueError, "layer must be None"),
        (
            {1: 0.5},
            {"method": "divprune"},
            ValueError,
            "works before the language model and takes no schedule",
        ),
    ],
)
def test_a_wrong_schedule_is_refused_on_entering(keep: Any, more: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        prune_visual_tokens(llava().model, **{"method": "fastv", "keep": keep, **more})
