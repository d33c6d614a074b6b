"""compact_cache: tokens that the caller chose leave every layer of a cache."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.transformers.vlm.models import llava
from tokenprune_kernels.integrations.transformers import compact_cache, prune_visual_tokens


def filled(layers: int = 3, tokens: int = 6) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(2, 2, tokens, 4), torch.randn(2, 2, tokens, 4), layer)
    return cache


def test_every_layer_keeps_the_tokens() -> None:
    cache = filled()
    before = [(layer.keys, layer.values) for layer in cache.layers]
    indices = torch.tensor([[0, 3, 5], [1, 2, -1]])
    assert compact_cache(cache, indices.int()) is cache
    assert cache.get_seq_length() == 3
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        for kept, whole in ((layer.keys, keys), (layer.values, values)):
            assert torch.equal(kept[0], whole[0, :, [0, 3, 5]])
            assert torch.equal(kept[1], torch.cat([whole[1, :, [1, 2]], torch.zeros(2, 1, 4)], 1))


def test_decoding_on_it_is_attention_to_what_is_kept() -> None:
    """The next token, with its old position, sees as much as a mask over the whole cache leaves it."""
    prompts = llava(2)
    model = prompts.model
    length = prompts.inputs["input_ids"].shape[1]
    kept = torch.tensor([[*range(0, length, 2)], [*range(1, length + 1, 2)][: (length + 1) // 2]]).clamp_max(length - 1)
    assert kept.shape[1] < length
    new, position = torch.tensor([[7], [11]]), torch.full((2, 1), length)

    def after(change: Any, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            cache = model(**prompts.inputs, use_cache=True).past_key_values
            change(cache)
            logits: torch.Tensor = model(
                input_ids=new, past_key_values=cache, position_ids=position, attention_mask=mask
            ).logits
        return logits[:, -1]

    masked = torch.zeros(2, length + 1, dtype=torch.long).scatter_(1, kept, 1)
    masked[:, -1] = 1
    want = after(lambda cache: None, masked)
    got = after(lambda cache: compact_cache(cache, kept), torch.ones(2, kept.shape[1] + 1, dtype=torch.long))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_empty_layers_stay_empty() -> None:
    assert compact_cache(DynamicCache(), torch.zeros(2, 3, dtype=torch.int64)).get_seq_length() == 0


def test_what_it_does_not_take_is_named() -> None:
    indices = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(TypeError, match="compact_cache: cache must be a transformers DynamicCache, got tuple"):
        compact_cache(((torch.zeros(1), torch.zeros(1)),), indices)
    prompts = llava()
    static = StaticCache(config=prompts.model.config.get_text_config(), max_cache_len=8)
    with pytest.raises(
        TypeError, match=r"compact_cache: cache must have layers that hold every token .*, got StaticLayer"
    ):
        compact_cache(static, indices)
    with pytest.raises(ValueError, match=r"tensors\[0\] must have size B = 1 in dimension 0, got \[2, 2, 6, 4\]"):
        compact_cache(filled(), indices[:1])
    with pytest.raises(IndexError, match=r"must lie in \[-1, 6\)"):
        compact_cache(filled(), indices + 3)


def test_a_cache_of_a_pruned_prompt_is_refused() -> None:
    """What is left of it is counted by the block that pruned it."""
    prompts = llava()
    with torch.no_grad(), prune_visual_tokens(prompts.model, "divprune", 9):
        cache = prompts.model(**prompts.inputs, use_cache=True).past_key_values
    with pytest.raises(
        TypeError, match="compact_cache: cache must not hold a prompt that prune_visual_tokens has pruned"
    ):
        compact_cache(cache, torch.tensor([[0, 1]]))
