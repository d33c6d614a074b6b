"""Attention scores of keys, with the entropy and log-sum-exp of every query row."""

import torch
from torch import Tensor

from .. import _checks
from .._backend import implementation


def cross_attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    key_indices: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    head_reduction: str = "mean",
    query_reduction: str = "mean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every key by the attention it receives: (scores, entropy, lse)."""
    _checks.attention(
        "cross_attention_scores",
        query, key, None, key_indices, query_mask, key_mask, query_positions, head_reduction, query_reduction,
    )  # fmt: skip
    ops = implementation(backend, query)
    scores, entropy, lse = ops.cross_attention_scores(
        query,
        key,
        key_indices=key_indices,
        query_mask=query_mask,
        key_mask=key_mask,
        query_positions=query_positions,
        scale=scale,
        causal=causal,
        cosine=cosine,
        head_reduction=head_reduction,
        query_reduction=query_reduction,
    )
    if ops is torch.ops.tokenprune and "+" not in query_reduction:
        scores = scores.squeeze(1)  # the op returns [B, R, ...]; the reference has dropped R = 1 already
    return scores, entropy, lse


def attention_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    key_indices: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    head_reduction: str = "mean",
    query_reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Scores from a log-sum-exp that is already known, for instance from the FlashAttention call that ran."""
    if lse is None:
        raise TypeError("tokenprune::attention_scores: lse must be a tensor, got None")
    _checks.attention(
        "attention_scores",
        query, key, lse, key_indices, query_mask, key_mask, query_positions, head_reduction, query_reduction,
    )  # fmt: skip
    ops = implementation(backend, query)
    scores: Tensor = ops.attention_scores(
        query,
        key,
        lse,
        key_indices=key_indices,
        query_mask=query_mask,
        key_mask=key_mask,
        query_positions=query_positions,
        scale=scale,
        causal=causal,
        cosine=cosine,
        head_reduction=head_reduction,
        query_reduction=query_reduction,
    )
    return scores.squeeze(1) if ops is torch.ops.tokenprune and "+" not in query_reduction else scores


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy and log-sum-exp of every query row over its visible keys: (entropy, lse), both [B, Hq, M]."""
    _checks.attention("attention_entropy", query, key, None, None, None, key_mask, query_positions, "mean", "mean")
    result: tuple[Tensor, Tensor] = implementation(backend, query).attention_entropy(
        query,
        key,
        key_mask=key_mask,
        query_positions=query_positions,
        scale=scale,
        causal=causal,
        cosine=cosine,
    )
    return result
