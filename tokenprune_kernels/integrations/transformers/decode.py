"""Decoding on the cache of a pruned prompt: the positions of new tokens, and the keys that each layer has cached."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import Pruned, Segment, layer_length, over_free_places
from .families import Family, Inputs, Model
from .interface import Arguments, all_rows
from .kinds import FULL, STATES, alike, check_attention, check_counts, kind_of, rotary_of, sees_of
from .masks import at_columns, decoder_mask
from .tokens import joined


@dataclass
class Decode:
    pruned: Pruned
    step: Tensor  # [T]: how far behind the prompt each new token is
    given_mask: Tensor | None  # [B, L], at least as long as what came after the prompt
    rows: int  # in front of the decoder's norm, the last of them; 0: all
    # What layers get, by the first layer of their segment and their kind.
    # What layers get, by the first of their segment and what they have in common (`alike`).
    replaced: dict[tuple[int, str, Model], Inputs] = field(default_factory=dict)


def begin_decode(pruned: Pruned, inputs: Inputs, cache: Any, mask: Any) -> tuple[Decode, Inputs]:
    """The decoding, and the arguments that the decoder gets. mask: that of the multimodal model, if it was called."""
    new = inputs.get("inputs_embeds")
    new = inputs.get("input_ids") if new is None else new
    if new is None:
        raise RuntimeError("prune_visual_tokens: the decoder was called without inputs_embeds or input_ids")
    batch, queries = new.shape[:2]
    pruned, since = pruned.of_batch(batch), pruned.since(cache)
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
    rows, inputs = all_rows(inputs)
    return Decode(pruned, step, mask, rows), inputs


def decode_layer(family: Family, decoder: Model, now: Decode, index: int, takes: Arguments, inputs: Inputs) -> Inputs:
    """The arguments that a decoder layer gets."""
    segment = now.pruned.segment_of(index)
    kind = kind_of(decoder.config, index)
    if segment is None or kind in STATES:  # the model looks at the mask of the new tokens alone
        return inputs
    key = segment.first, *alike(family, decoder, index)
    if key not in now.replaced:
        takes.given(inputs, "hidden_states", "attention_mask", "position_embeddings", "cache")
        cache, hidden = takes.cache(inputs), inputs["hidden_states"]
        # Of this layer: those in front of it may have cached their new tokens already.
        keys = layer_length(cache, index) + len(now.step)
        mask = _mask(family, decoder.config, kind, now, segment, keys, hidden)
        mask = over_free_places(mask, cache, index, len(now.step), keys, hidden.device)
        replaced = now.replaced[key] = {"attention_mask": mask, "position_ids": None}
        if segment.next_position is not None:
            position = segment.next_position.unsqueeze(1) + now.step
            replaced["position_embeddings"] = rotary_of(family, decoder, index, hidden, position)
    return {**inputs, **now.replaced[key]}


def _mask(family: Family, config: Any, kind: str, now: Decode, segment: Segment, keys: int, hidden: Tensor) -> Any:
    check_attention(config, kind)
    tokens, before, given, queries = segment.tokens, now.pruned.before, now.given_mask, len(now.step)
    batch, new = hidden.shape[-3], keys - before.length - tokens.length
    check_counts(family, config, now.pruned.length + new)
    bias = segment.bias_of_columns()
    bias = None if bias is None else torch.nn.functional.pad(bias, (before.length, new))
    given = None if given is None else given[:, given.shape[1] - new :].bool()
    padding = joined([(before.real, before.length), (tokens.real, tokens.length), (given, new)], batch, hidden.device)
    sees = sees_of(family, config, kind, now.pruned.padded)
    if kind != FULL:  # what is seen depends on how far apart tokens were in the prompt
        behind = torch.arange(new, device=hidden.device) + now.pruned.length
        sees = at_columns(sees, torch.cat([segment.columns.to(hidden.device), behind.expand(batch, -1)], 1))
    return decoder_mask(
        config, sees, as_it_is=kind == FULL, batch=batch, queries=queries, keys=keys, padding=padding, bias=bias,
        dtype=hidden.dtype, device=hidden.device,
    )  # fmt: skip
