"""Positions that are numbered anew inside the model: each layer counts what is left in front of it."""

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.transformers.vlm import oracle, runs_crops, runs_qwen
from tests.transformers.vlm.checks import (
    CLOSE,
    IN_MODEL,
    WITHOUT_MERGING,
    assert_decoded_like_the_oracle,
    drops_of,
    generate,
)
from tests.transformers.vlm.models import llava, text
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

SCHEDULE = {1: 0.4, 3: 9}


@pytest.mark.parametrize(
    ("method", "compact"), [*((name, False) for name in IN_MODEL), ("coast", True), ("sts", True), ("fastv", True)]
)
def test_32_decoded_tokens_equal_the_float64_path(method: str, compact: bool) -> None:
    prompts = llava(3, ragged=True, images=2)
    options = {"positions": "renumber", "compact_cache": compact, **WITHOUT_MERGING.get(method, {})}
    with prune_visual_tokens(prompts.model, method, SCHEDULE, **options) as pruning:
        out = generate(prompts.model, prompts.inputs, 32)
    drops = drops_of(prompts, pruning, 0, compact)
    assert [drop.layer for drop in drops] == ([0, 1, 3] if method == "sts" else [1, 3])
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=True)
    with pytest.raises(AssertionError):  # and it makes a difference
        assert_decoded_like_the_oracle(prompts, drops, out, renumber=False)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl"])
def test_images_of_any_size_with_budgets_of_their_own(family: str) -> None:
    prompts = runs_crops.prompts_of(family, "several")
    with runs_crops.pruned(prompts, "fastv", 0.3, positions="renumber", per="image") as pruning:
        new, logits = runs_crops.generate(prompts, 32)
    want = oracle.logits(prompts, drops_of(prompts, pruning, 2), new[:, :-1], renumber=True)[:, -32:]
    torch.testing.assert_close(logits.double(), want, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("compact", [False, True])
@torch.no_grad()
def test_a_turn_of_several_tokens_goes_on_behind_what_each_layer_has(compact: bool) -> None:
    prompts = llava(2, ragged=True)
    turn = torch.tensor([text(5, torch.Generator().manual_seed(b)) for b in range(2)])
    with prune_visual_tokens(prompts.model, "fastv", SCHEDULE, positions="renumber", compact_cache=compact) as pruning:
        cache = prompts.model(**prompts.inputs).past_key_values
        mask = torch.nn.functional.pad(prompts.inputs["attention_mask"], (0, 5), value=1)
        got = prompts.model(input_ids=turn, attention_mask=mask, past_key_values=cache).logits
    want = oracle.logits(prompts, drops_of(prompts, pruning, 0, compact), turn, renumber=True)[:, -5:]
    torch.testing.assert_close(got.double(), want, **CLOSE)


@torch.no_grad()
def test_a_prompt_that_is_repeated_keeps_its_positions() -> None:
    prompts = llava(1)
    turn = torch.tensor([[5, 6]])
    with prune_visual_tokens(prompts.model, "fastv", SCHEDULE, positions="renumber"):
        cache = prompts.model(**prompts.inputs).past_key_values
        want = prompts.model(input_ids=turn, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_repeat_interleave(3)
        got = prompts.model(input_ids=turn.expand(3, -1), past_key_values=cache).logits
    torch.testing.assert_close(got, want.expand(3, -1, -1), **CLOSE)


def test_a_schedule_that_keeps_all_changes_no_bit() -> None:
    prompts = llava(3, ragged=True)
    plain = generate(prompts.model, prompts.inputs, 2)
    with prune_visual_tokens(prompts.model, "fastv", {1: 1.0, 3: 36}, positions="renumber"):
        out = generate(prompts.model, prompts.inputs, 2)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_mrope_is_refused_by_name_and_pyramiddrop_keeps_its_positions_there(family: str) -> None:
    prompts: Any = runs_qwen.batch(family)
    with pytest.raises(ValueError, match=r"the positions of Qwen.* carry the image's geometry: original"):
        prune_visual_tokens(prompts.model, "fastv", 9, positions="renumber")
    with torch.no_grad():
        logits = []
        for positions in (None, "original"):
            with prune_visual_tokens(prompts.model, "pyramiddrop", 9, positions=positions):
                logits.append(prompts.model(**prompts.inputs).logits[:, -1])
    assert torch.equal(*logits)
