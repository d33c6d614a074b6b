"""What a decoder layer gets besides its hidden states, of the tokens that are left."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import gather_compact
from .cache import Before, Segment, over_free_places
from .families import Family, Inputs, Model
from .kinds import STATES, check_attention, kind_of, rotary_of
from .masks import at_columns, decoder_mask, sees_by
from .tokens import Tokens, indices_at, joined


def composed(columns: Sequence[Tensor]) -> Tensor:
    """[B, L]: of columns that each lead into the sequence before, those of the last into the first; -1 for padding."""
    return functools.reduce(indices_at, columns)


def padded(tokens: Tokens) -> Tensor:
    """[B]: how many columns of padding are in front of each sample."""
    if tokens.real is None:
        return tokens.slot.new_zeros(len(tokens.counts))
    return (tokens.real.cumsum(1) == 0).sum(1)


def shortened(
    family: Family, decoder: Model, layer: int, segment: Segment, inputs: Inputs, *, number: Tensor | None,
    before: Before, cache: Any,
) -> dict[str, Any]:  # fmt: skip
    """Rotary embeddings and mask of a layer and its like, from `inputs`, which their loop gives it: those of
    the whole prompt. number [B, L]: the new positions of columns; None: they keep their own. before: what is cached."""
    after, columns = segment.tokens, segment.columns
    dtype, batch = inputs["hidden_states"].dtype, len(columns)
    held = before.length
    keys, bias = held + after.length, segment.bias_of_columns()
    if number is not None:
        embeddings = rotary_of(family, decoder, layer, inputs["hidden_states"], number)
    else:
        given = inputs["position_embeddings"]  # cosines and sines, or their complex sums
        rotary = [_with_batch(t, batch) for t in ([given] if isinstance(given, Tensor) else given)]
        batch_dims = [t.dim() - 3 for t in rotary]  # [B, L, D] or, one for each axis of the image, [3, B, L, D]
        rotary = gather_compact(rotary, columns, dims=[d + 1 for d in batch_dims], batch_dims=batch_dims)
        embeddings = rotary[0] if isinstance(given, Tensor) else tuple(rotary)
    kind = kind_of(decoder.config, layer)
    check_attention(decoder.config, kind)
    made = sees_by(inputs["attention_mask"], batch)
    mask = after.real if kind in STATES else decoder_mask(
        decoder.config, family.mask_function if made is None else at_columns(made, columns, held),
        as_it_is=made is None, batch=batch, queries=after.length, keys=keys,
        padding=joined([(before.real, held), (after.real, after.length)], batch, columns.device),
        bias=None if bias is None else torch.nn.functional.pad(bias, (held, 0)), dtype=dtype, device=columns.device,
    )  # fmt: skip
    mask = over_free_places(mask, cache, segment.first, after.length, keys, columns.device)
    # FlashAttention would take gaps in the positions for borders between packed sequences.
    replaced = {"position_embeddings": embeddings, "attention_mask": mask, "position_ids": None}
    if inputs.get("cache_position") is not None:
        replaced["cache_position"] = torch.arange(held, keys, device=columns.device)
    return replaced


def _with_batch(t: Tensor, batch: int) -> Tensor:
    """Rotary embeddings are [1, L, D] when every sample has the same positions."""
    return t.expand(*t.shape[:-3], batch, *t.shape[-2:])
