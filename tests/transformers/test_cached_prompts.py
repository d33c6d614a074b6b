"""Images behind a cached prompt, such as a system prompt: chosen from and decoded on as those of the whole prompt."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers.test_static import static_cache
from tests.transformers.vlm import models_qwen as qwen
from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import (
    CLOSE,
    LAYER,
    RENUMBERED,
    drops_of,
    generate,
    options_of,
)
from tests.transformers.vlm.models import PAD, Prompts, llava, text
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens
from tokenprune_kernels.integrations.transformers import cache as cache_module

SYSTEM = 5


def conversation(*, padded: bool, images: int = 1) -> tuple[Prompts, Prompts]:
    """The prompts as they are put through at once, and those that come behind the first columns of them.

    padded: in front of one of the cached prompts, and in front of one of those with images.
    """
    turn = llava(2, ragged=padded, images=images)
    draw = torch.Generator().manual_seed(8)
    system = torch.tensor([text(SYSTEM, draw), text(SYSTEM, draw)])
    mask = torch.ones_like(system)
    if padded:
        system[1, :2], mask[1, :2] = PAD, 0
    ids = torch.cat([system, turn.inputs["input_ids"]], 1)
    mask = torch.cat([mask, turn.inputs["attention_mask"]], 1)
    return Prompts(turn.model, {**turn.inputs, "input_ids": ids, "attention_mask": mask}, turn.visual), turn


def cached(whole: Prompts, cache: Any = None, positions: Tensor | None = None) -> Any:
    with torch.no_grad():
        return whole.model(
            input_ids=whole.inputs["input_ids"][:, :SYSTEM], attention_mask=whole.inputs["attention_mask"][:, :SYSTEM],
            position_ids=positions, past_key_values=cache, use_cache=True,
        ).past_key_values  # fmt: skip


@pytest.mark.parametrize(
    ("method", "compact", "padded"),
    # The padding between the two prompts stays a distance, which the float64 path does not number.
    [
        ("coast", False, False),
        ("coast", True, True),
        ("sts", False, True),
        ("adafv", False, False),
        ("divprune", False, True),
    ],
)
def test_images_behind_a_cached_prompt_equal_the_float64_path(method: str, compact: bool, padded: bool) -> None:
    """And so does a later turn, of a token and two more."""
    whole, turn = conversation(padded=padded)
    length = whole.inputs["input_ids"].shape[1]
    new = torch.tensor([[7, 8, 9], [11, 12, 13]])
    mask = torch.nn.functional.pad(whole.inputs["attention_mask"], (0, 3), value=1)
    with (
        torch.no_grad(),
        prune_visual_tokens(whole.model, method, 9, compact_cache=compact, **options_of(method)) as pruning,
    ):
        cache = cached(whole)
        out = whole.model(
            **{**turn.inputs, "attention_mask": whole.inputs["attention_mask"]}, past_key_values=cache
        )  # fmt: skip
        assert cache.get_seq_length() == length
        steps = [out.logits[:, -1:]]
        for start, end in ((0, 1), (1, 3)):
            more = {"attention_mask": mask[:, : length + end]}
            steps.append(whole.model(input_ids=new[:, start:end], past_key_values=cache, **more).logits)
    drops = drops_of(whole, pruning, LAYER, compact)
    want = oracle.logits(whole, drops, new, renumber=method in RENUMBERED)[:, length - 1 :]
    torch.testing.assert_close(torch.cat(steps, 1).double(), want, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("method", ["coast", "divprune"])
def test_generate_goes_on_from_a_cached_prompt(method: str, kind: str) -> None:
    if kind == "static" and not cache_module._STATIC:
        pytest.skip("static layers of this transformers do not count")
    whole, _ = conversation(padded=True)
    length = whole.inputs["input_ids"].shape[1]
    # As generate counts them, without the padding.
    mask = torch.nn.functional.pad(whole.inputs["attention_mask"], (0, 11), value=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with prune_visual_tokens(whole.model, method, 9, **options_of(method)) as pruning:
        cache = cached(whole, static_cache(whole) if kind == "static" else None, positions[:, :SYSTEM])
        again = copy.deepcopy(cache)
        out = generate(whole.model, whole.inputs, 12, past_key_values=cache)
        kept = pruning.kept
        same = generate(whole.model, whole.inputs, 12, past_key_values=again)
    assert torch.equal(same.sequences, out.sequences)
    assert torch.equal(pruning.kept, kept)
    new, drops = out.sequences[:, length:-1], drops_of(whole, pruning, LAYER)
    want = oracle.logits(whole, drops, new, position_ids=positions)[:, length - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_as_for_the_whole_prompt(method: str) -> None:
    whole, turn = conversation(padded=True, images=2)
    options = {"seed": 3, **options_of(method)}
    kept: list[dict[int, Tensor]] = []
    with torch.no_grad():
        for at_once in (True, False):
            with prune_visual_tokens(whole.model, method, 20, **options) as pruning:
                if at_once:
                    whole.model(**whole.inputs)
                else:
                    mask = {"attention_mask": whole.inputs["attention_mask"]}
                    whole.model(**{**turn.inputs, **mask}, past_key_values=cached(whole))
            kept.append(dict(pruning.kept_at))
    assert kept[0].keys() == kept[1].keys()
    for layer, tokens in kept[0].items():
        assert torch.equal(kept[1][layer], tokens)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_mrope_and_deepstack_behind_a_cached_prompt(family: str) -> None:
    """generate counts the positions of the whole conversation, in versions where it does so without pruning."""
    prompts = qwen.prompts(qwen.model(family), [[SYSTEM + 2, (1, 8, 12), 2, (1, 4, 8), 5]])
    more = {"suppress_tokens": qwen.SPECIAL}
    plain = [
        generate(prompts.model, prompts.inputs, 2, **more, **kwargs)
        for kwargs in ({}, {"past_key_values": cached(prompts)})
    ]
    if not torch.allclose(plain[0].logits[0], plain[1].logits[0], atol=1e-4):
        pytest.skip("this transformers counts the positions of an image behind a cached prompt from the image on")
    for method in ("coast", "divprune"):
        with prune_visual_tokens(prompts.model, method, 0.4, **options_of(method)) as pruning:
            cache = cached(prompts)
            out = generate(prompts.model, prompts.inputs, 6, past_key_values=cache, **more)
            kept = pruning.kept
            want = generate(prompts.model, prompts.inputs, 6, **more)
        assert torch.equal(pruning.kept, kept)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(want.logits), rtol=0, atol=1e-5)


def test_an_image_in_a_later_turn_of_a_pruned_conversation_is_an_error() -> None:
    prompts = llava()
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        cache = prompts.model(**prompts.inputs).past_key_values
        mask = torch.cat([prompts.inputs["attention_mask"]] * 2, 1)
        with pytest.raises(NotImplementedError, match="not in a later turn behind a pruned prompt"):
            prompts.model(**{**prompts.inputs, "attention_mask": mask}, past_key_values=cache)


def test_what_a_cached_prompt_cannot_be_is_named() -> None:
    whole, turn = conversation(padded=False)
    with torch.no_grad(), prune_visual_tokens(whole.model, "coast", 9, layer=LAYER):
        with pytest.raises(NotImplementedError, match=r"attention_mask must be \[B, L\] or absent"):
            whole.model(**turn.inputs, past_key_values=cached(whole))  # of the new tokens alone
        cache = cached(whole)
        cache.layers[1].keys, cache.layers[1].values = cache.layers[1].keys[:, :, 1:], cache.layers[1].values[:, :, 1:]
        mask = {"attention_mask": whole.inputs["attention_mask"]}
        with pytest.raises(RuntimeError, match="layers of the cache hold different numbers of tokens"):
            whole.model(**{**turn.inputs, **mask}, past_key_values=cache)
