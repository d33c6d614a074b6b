"""Decoding on the cache of a pruned prompt: the positions of new tokens, and the keys that each layer has cached."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import Pruned, Segment, layer_length, over_free_places
from .families import Family, Inputs, Model
from .interface import Arguments
from .masks import decoder_mask
from .tokens import joined


@dataclass
class Decode:
    pruned: Pruned
    step: Tensor  # [T]: how far behind the prompt each new token is
    given_mask: Tensor | None  # [B, L], at least as long as what came after the prompt
    replaced: dict[int, Inputs] = field(default_factory=dict)  # what layers get, by their segment's first layer


def begin_decode(pruned: Pruned, inputs: Inputs, cache: Any) -> tuple[Decode, Inputs]:
    """The decoding, and the arguments that the decoder gets."""
    new = inputs.get("inputs_embeds")
    new = inputs.get("input_ids") if new is None else new
    if new is None:
        raise RuntimeError("prune_visual_tokens: the decoder was called without inputs_embeds or input_ids")
    batch, queries = new.shape[:2]
    pruned, since, mask = pruned.of_batch(batch), pruned.since(cache), inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= since + queries):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"prune_visual_tokens: on the cache of a pruned prompt the attention_mask must be absent or [B, L] with L "
            f"at least {since + queries}, the tokens since then; got {got}"
        )
    # Behind the prompt's last position, whatever the caches' lengths are.
    step = torch.arange(queries, device=pruned.next_position.device) + since
    inputs = {**inputs, "position_ids": pruned.next_position.unsqueeze(-1) + step}
    if "cache_position" in inputs:  # of the first layer, which may be shorter than the caller knows
        inputs["cache_position"] = None
    return Decode(pruned, step, mask), inputs


def decode_layer(family: Family, decoder: Model, now: Decode, index: int, takes: Arguments, inputs: Inputs) -> Inputs:
    """The arguments that a decoder layer gets."""
    segment = now.pruned.segment_of(index)
    if segment is None:
        return inputs
    if segment.first not in now.replaced:
        takes.given(inputs, "hidden_states", "attention_mask", "position_embeddings", "cache")
        cache, hidden = takes.cache(inputs), inputs["hidden_states"]
        mask = _mask(family, decoder.config, now, segment, cache, hidden)
        replaced = now.replaced[segment.first] = {"attention_mask": mask, "position_ids": None}
        if segment.next_position is not None:
            position = segment.next_position.unsqueeze(1) + now.step
            replaced["position_embeddings"] = decoder.rotary_emb(hidden, position_ids=position)
    return {**inputs, **now.replaced[segment.first]}


def _mask(family: Family, config: Any, now: Decode, segment: Segment, cache: Any, hidden: Tensor) -> Any:
    tokens, before, given, queries = segment.tokens, now.pruned.before, now.given_mask, len(now.step)
    keys = layer_length(cache, segment.first) + queries
    new = keys - before.length - tokens.length
    bias = segment.bias_of_columns()
    bias = None if bias is None else torch.nn.functional.pad(bias, (before.length, new))
    given = None if given is None else given[:, given.shape[1] - new :].bool()
    padding = joined(
        [(before.real, before.length), (tokens.real, tokens.length), (given, new)], hidden.shape[0], hidden.device
    )
    mask = decoder_mask(
        family, config, batch=hidden.shape[0], queries=queries, keys=keys, padding=padding, bias=bias,
        dtype=hidden.dtype, device=hidden.device,
    )  # fmt: skip
    return over_free_places(mask, cache, segment.first, queries, keys, hidden.device)
