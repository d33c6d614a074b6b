"""Key/value caches of pruned prompts: their lengths, decoding on them, later turns, copies."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import (
    CLOSE,
    LAYER,
    RENUMBERED,
    assert_decoded_like_the_oracle,
    drops_of,
    generate,
    options_of,
    over_four,
    over_four_and_compact,
)
from tests.transformers.vlm.models import Prompts, llava, text
from tokenprune_kernels.integrations.transformers import cache as cache_module
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

over_compact = pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])


def forward(prompts: Prompts, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = prompts.model(**{**prompts.inputs, **more}).logits
    return logits


def assert_last_row(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got[:, -1].double(), want[:, -1], **CLOSE)


# --- caches -----------------------------------------------------------------------------------------------------------


def lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


@over_four_and_compact
def test_prefill_and_decoding_step_by_step_without_any_hint(method: str, compact: bool) -> None:
    """No mask, no positions, no cache_position: a prefill is an empty cache. Every layer's cache grows by one."""
    prompts = llava(2)
    length = prompts.inputs["input_ids"].shape[1]
    new = torch.tensor([[7, 8, 9], [11, 12, 13]])
    with (
        torch.no_grad(),
        prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)) as pruning,
    ):
        out = prompts.model(input_ids=prompts.inputs["input_ids"], pixel_values=prompts.inputs["pixel_values"])
        first = {"sts": length - 18}.get(method, length if method == "coast" else length - 27)
        first, last = (length - 27 if compact else first), length - 27
        assert lengths(out.past_key_values) == [first, first, last, last]
        size = sum(t.numel() for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
        assert size == 2 * 2 * 2 * 16 * (2 * first + 2 * last)  # keys and values, samples, heads, width
        steps = [out.logits[:, -1]]
        for n in range(3):
            out = prompts.model(input_ids=new[:, n : n + 1], past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
            assert lengths(out.past_key_values) == [first + n + 1, first + n + 1, last + n + 1, last + n + 1]
    drops = drops_of(prompts, pruning, LAYER, compact)
    more = {"renumber": method in RENUMBERED}
    want = oracle.logits(prompts, drops, new, **more)[:, length - 1 :]
    torch.testing.assert_close(torch.stack(steps, 1).double(), want, **CLOSE)


def test_compact_cache_is_one_gather_compact_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = llava(3, ragged=True)
    calls: list[int] = []
    real = cache_module.gather_compact

    def counted(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(tensors))
        return real(tensors, *args, **kwargs)

    monkeypatch.setattr(cache_module, "gather_compact", counted)
    with prune_visual_tokens(prompts.model, "fastv", 9, layer=3, compact_cache=True) as pruning:
        out = generate(prompts.model, prompts.inputs, 5)
    assert calls == [6]  # the keys and values of three layers, once
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, 3, compact=True), out)


@over_four
def test_without_a_cache_every_step_is_a_pruned_prefill(method: str) -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        got = forward(prompts, use_cache=False)
        drops = drops_of(prompts, pruning, LAYER)
        cached = generate(prompts.model, prompts.inputs, 4)
        uncached = generate(prompts.model, prompts.inputs, 4, use_cache=False)
        assert pruning.stats["prefills"] == 6
    more = {"renumber": method in RENUMBERED}
    assert_last_row(got, oracle.logits(prompts, drops, **more))
    if method == "divprune":  # whose choice does not depend on what was generated
        assert torch.equal(cached.sequences, uncached.sequences)


def test_a_tuple_in_place_of_an_output_is_decoded_on() -> None:
    prompts = llava(2, ragged=True)
    token = torch.tensor([[7], [8]])
    mask = torch.cat([prompts.inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    results = []
    for as_dict in (True, False):
        with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER, compact_cache=True):
            out = prompts.model(**prompts.inputs, return_dict=as_dict, use_cache=True)
            cache = out.past_key_values if as_dict else out[1]
            results.append(prompts.model(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*results)


# --- later turns ------------------------------------------------------------------------------------------------------


@over_four_and_compact
@pytest.mark.parametrize("through", ["forward", "generate"])
def test_a_second_turn_of_text_equals_the_float64_path(method: str, compact: bool, through: str) -> None:
    prompts = llava(2, ragged=True)
    length = prompts.inputs["input_ids"].shape[1]
    question = torch.tensor([text(6, torch.Generator().manual_seed(b)) for b in range(2)])
    with (
        torch.no_grad(),
        prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)) as pruning,
    ):
        first = generate(prompts.model, prompts.inputs, 4)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.nn.functional.pad(prompts.inputs["attention_mask"], (0, 10), value=1)
        if through == "generate":  # it is given the whole conversation, and cuts off what the cache has
            out = generate(prompts.model, {"input_ids": ids, "attention_mask": mask}, 3,
                           past_key_values=first.past_key_values)  # fmt: skip
            got, new = torch.stack(out.logits, 1), out.sequences[:, length:-1]
        else:
            new = ids[:, length:]
            got = prompts.model(
                input_ids=new[:, 3:], attention_mask=mask, past_key_values=first.past_key_values
            ).logits  # the last generated token is not in the cache yet
        assert pruning.stats["prefills"] == 1
    drops = drops_of(prompts, pruning, LAYER, compact)
    more = {"renumber": method in RENUMBERED}
    want = oracle.logits(prompts, drops, new, **more)[:, -got.shape[1] :]
    torch.testing.assert_close(got.double(), want, **CLOSE)


@over_four_and_compact
def test_a_second_turn_through_generate_without_padding(method: str, compact: bool) -> None:
    """generate leaves a mask without padding out: how much of the conversation is cached, the cache alone says."""
    prompts = llava()
    length = prompts.inputs["input_ids"].shape[1]
    question = torch.tensor([text(6, torch.Generator().manual_seed(1))])
    with prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)) as pruning:
        first = generate(prompts.model, prompts.inputs, 4)
        kept = pruning.kept
        cache = first.past_key_values
        assert cache.get_seq_length() == length + 3  # the last generated token is not in it yet
        for mask in (True, False):
            ids = torch.cat([first.sequences, question], 1)
            more = {"attention_mask": torch.ones_like(ids)} if mask else {}
            out = generate(prompts.model, {"input_ids": ids, **more}, 3, past_key_values=copy.deepcopy(cache))
            new = out.sequences[:, length:-1]
            assert out.past_key_values.get_seq_length() == length + new.shape[1]
            assert pruning.kept is kept
            drops = drops_of(prompts, pruning, LAYER, compact)
            numbers = {"renumber": method in RENUMBERED}
            want = oracle.logits(prompts, drops, new, **numbers)[:, -3:]
            torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)


@over_four_and_compact
def test_a_pruned_cache_is_cropped_by_the_lengths_of_the_conversation(method: str, compact: bool) -> None:
    prompts = llava(2)
    length = prompts.inputs["input_ids"].shape[1]
    turn, other = torch.tensor([[7, 8, 9], [11, 12, 13]]), torch.tensor([[5], [6]])
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)):
        cache = prompts.model(**prompts.inputs).past_key_values
        want = prompts.model(input_ids=other, past_key_values=copy.deepcopy(cache)).logits
        for crop in (length, -3):
            again = copy.deepcopy(cache)
            prompts.model(input_ids=turn, past_key_values=again)
            again.crop(length + 3)  # nothing
            assert again.get_seq_length() == length + 3
            again.crop(crop)
            assert again.get_seq_length() == length
            assert torch.equal(prompts.model(input_ids=other, past_key_values=again).logits, want)
        again.crop(-2)
        with pytest.raises(RuntimeError, match="cropped, into its pruned prompt"):
            prompts.model(input_ids=other, past_key_values=again)


@over_compact
def test_a_pruned_cache_that_was_reset_is_filled_anew(compact: bool) -> None:
    prompts, other = llava(2), llava(3, ragged=True)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER, compact_cache=compact) as pruning:
        want = prompts.model(**prompts.inputs).logits
        cache = prompts.model(**other.inputs).past_key_values
        cache.reset()
        if cache.layers[0].get_seq_length():
            pytest.skip("this transformers only zeroes what a cache holds")
        assert cache.get_seq_length() == 0
        assert torch.equal(prompts.model(**prompts.inputs, past_key_values=cache).logits, want)
        assert cache.get_seq_length() == prompts.inputs["input_ids"].shape[1]
        assert pruning.stats["prefills"] == 3


def test_padding_in_a_later_turn_is_masked() -> None:
    prompts = llava(2)
    mask = torch.cat([prompts.inputs["attention_mask"], torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])], 1)
    results = []
    for filler in (0, 33):
        question = torch.tensor([[filler, filler, 7, 8], [9, 10, 11, 12]])
        with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
            cache = prompts.model(**prompts.inputs).past_key_values
            results.append(prompts.model(input_ids=question, attention_mask=mask, past_key_values=cache).logits[:, -1])
    assert torch.equal(*results)


@over_compact
def test_a_cache_goes_on_in_the_next_block_and_as_a_copy(compact: bool) -> None:
    prompts = llava(2, ragged=True)
    token, mask = torch.tensor([[7], [8]]), torch.nn.functional.pad(prompts.inputs["attention_mask"], (0, 1), value=1)
    more = {"input_ids": token, "attention_mask": mask}
    with torch.no_grad():
        with prune_visual_tokens(prompts.model, "coast", 9, layer=1, compact_cache=compact):
            cache = prompts.model(**prompts.inputs).past_key_values
            copied, again = copy.deepcopy(cache), copy.deepcopy(cache)
            want = prompts.model(**more, past_key_values=cache).logits
            assert torch.equal(prompts.model(**more, past_key_values=copied).logits, want)
        with prune_visual_tokens(prompts.model, "fastv", 20, layer=3):
            assert torch.equal(prompts.model(**more, past_key_values=again).logits, want)


def test_one_pruned_prompt_serves_a_batch_of_questions() -> None:
    prompts = llava()
    questions = torch.tensor([[7, 8], [9, 10], [11, 12]])
    with torch.no_grad(), prune_visual_tokens(prompts.model, "divprune", 9):
        cache = prompts.model(**prompts.inputs).past_key_values
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(3)
        together = prompts.model(input_ids=questions, past_key_values=repeated).logits
        for b in range(3):
            alone = prompts.model(input_ids=questions[b : b + 1], past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(together[b : b + 1], alone, **CLOSE)
    two = llava(2)
    with torch.no_grad(), prune_visual_tokens(two.model, "divprune", 9):
        cache = two.model(**two.inputs).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(RuntimeError, match="the cache holds 2 pruned prompts, the batch has 4"):
            two.model(input_ids=torch.tensor([[7]] * 4), past_key_values=cache)


def test_a_cache_whose_layers_were_cropped_to_one_length_is_an_error() -> None:
    prompts = llava()
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        cache = prompts.model(**prompts.inputs).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :10], layer.values[:, :, :10]
        with pytest.raises(RuntimeError, match="cropped"):
            prompts.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
