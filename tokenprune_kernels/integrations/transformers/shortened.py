"""What a decoder layer gets besides its hidden states, of the tokens that are left."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import gather_compact
from .cache import Segment
from .families import Family, Inputs, Model
from .kinds import LINEAR, check_attention, rotary_of
from .masks import at_columns, decoder_mask, sees_by
from .tokens import Tokens, indices_at


def composed(columns: Sequence[Tensor]) -> Tensor:
    """[B, L]: of columns that each lead into the sequence before, those of the last into the first; -1 for padding."""
    return functools.reduce(indices_at, columns)


def padded(tokens: Tokens) -> Tensor:
    """[B]: how many columns of padding are in front of each sample."""
    if tokens.real is None:
        return tokens.slot.new_zeros(len(tokens.counts))
    return (tokens.real.cumsum(1) == 0).sum(1)


def shortened(
    family: Family, decoder: Model, kind: str, segment: Segment, inputs: Inputs, *, renumber: bool
) -> dict[str, Any]:
    """Rotary embeddings and mask of the layers of a kind, from `inputs`, which their loop gives one of them: those of
    the whole prompt."""
    after, columns = segment.tokens, segment.columns
    dtype, batch = inputs["hidden_states"].dtype, len(columns)
    if renumber:
        embeddings = rotary_of(decoder, kind, inputs["hidden_states"], after.numbered())
    else:
        given = inputs["position_embeddings"]  # cosines and sines, or their complex sums
        rotary = [_with_batch(t, batch) for t in ([given] if isinstance(given, Tensor) else given)]
        batch_dims = [t.dim() - 3 for t in rotary]  # [B, L, D] or, one for each axis of the image, [3, B, L, D]
        rotary = gather_compact(rotary, columns, dims=[d + 1 for d in batch_dims], batch_dims=batch_dims)
        embeddings = rotary[0] if isinstance(given, Tensor) else tuple(rotary)
    check_attention(decoder.config, kind)
    made = sees_by(inputs["attention_mask"], batch)
    mask = after.real if kind == LINEAR else decoder_mask(
        decoder.config, family.mask_function if made is None else at_columns(made, columns), as_it_is=made is None,
        batch=batch, queries=after.length, keys=after.length, padding=after.real, bias=segment.bias_of_columns(),
        dtype=dtype, device=columns.device,
    )  # fmt: skip
    # FlashAttention would take gaps in the positions for borders between packed sequences.
    replaced = {"position_embeddings": embeddings, "attention_mask": mask, "position_ids": None}
    if inputs.get("cache_position") is not None:
        replaced["cache_position"] = torch.arange(after.length, device=columns.device)
    return replaced


def _with_batch(t: Tensor, batch: int) -> Tensor:
    """Rotary embeddings are [1, L, D] when every sample has the same positions."""
    return t.expand(*t.shape[:-3], batch, *t.shape[-2:])
