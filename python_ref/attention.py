"""Attention probabilities reduced to one score per key, with the entropy and log-sum-exp of every row."""

import torch
from torch import Tensor

from ._common import entries, normalize, widen


def _logits(query: Tensor, key: Tensor, scale: float | None, cosine: bool) -> Tensor:
    """s(h, i, j) = scale * <q(h, i), k(h // group, j)>, [B, Hq, M, N]."""
    if scale is None:
        scale = 1.0 if cosine else query.shape[-1] ** -0.5
    query, key = (normalize(query), normalize(key)) if cosine else (widen(query), widen(key))
    group = query.shape[1] // max(key.shape[1], 1)
    return scale * (query @ key.repeat_interleave(group, dim=1).mT)


def _hide(logits: Tensor, key_mask: Tensor | None, query_positions: Tensor | None, causal: bool) -> Tensor:
    """-inf where key j is not visible to row i: masked, or behind the row's position when causal."""
    rows, keys = logits.shape[-2:]
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if causal:
        if query_positions is None:  # right-aligned: the last row sees every key
            query_positions = torch.arange(keys - rows, keys, device=logits.device).unsqueeze(0)
        later = torch.arange(keys, device=logits.device) > query_positions.unsqueeze(-1)
        logits = logits.masked_fill(later.unsqueeze(1), -torch.inf)
    return logits


def _probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """P = exp(s - lse); a row that sees nothing (lse = -inf) has P = 0."""
    lse = lse.to(logits.dtype).unsqueeze(-1)
    return torch.where((lse == -torch.inf) | (logits == -torch.inf), 0.0, (logits - lse).exp())


def _entropy(logits: Tensor, lse: Tensor) -> Tensor:
    """H = -sum_j P log P with log P = s - lse and 0 log 0 = 0."""
    p = _probabilities(logits, lse)
    return torch.where(p == 0, 0.0, p * (lse.unsqueeze(-1) - logits)).sum(-1)


def _reduce_heads(p: Tensor, reduction: str) -> Tensor:
    """[B, Hq, M, V] -> [B, H', M, V], H' = 1 or, for none, Hq."""
    if reduction == "none":
        return p
    if reduction == "max" and p.shape[1]:
        return p.amax(1, keepdim=True)
    total = p.sum(1, keepdim=True)
    return total / max(p.shape[1], 1) if reduction == "mean" else total


def _reduce_rows(p: Tensor, query_mask: Tensor | None, reduction: str) -> Tensor:
    """[B, H', M, V] -> [B, H', V] over the rows with query_mask True; no such row gives 0. None: 0 in other rows."""
    batch, _, rows, _ = p.shape
    valid = p.new_ones(batch, rows, dtype=torch.bool) if query_mask is None else query_mask
    if reduction == "last":
        row = torch.arange(rows, device=p.device)
        valid = valid & (row == torch.where(valid, row, -1).amax(-1, keepdim=True)) if rows else valid
    p = torch.where(valid[:, None, :, None], p, 0.0)
    if reduction == "none":
        return p
    if reduction == "max" and rows:
        return p.amax(2)
    total = p.sum(2)
    return total / valid.sum(-1).clamp_min(1)[:, None, None] if reduction == "mean" else total


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
) -> Tensor:
    """Scores of the keys from a given lse [B, Hq, M]: heads are reduced first, then rows; row reductions join by +."""
    logits = _hide(_logits(query, key, scale, cosine), key_mask, query_positions, causal)
    p = _reduce_heads(_probabilities(logits, lse), head_reduction)
    # [B, R, H', N]; without a reduction [B, 1, H', M, N]
    scores = torch.stack([_reduce_rows(p, query_mask, r) for r in query_reduction.split("+")], dim=1)
    if key_indices is not None:
        beside = (slice(None), *[None] * (scores.dim() - 2))
        index, valid = (t[beside] for t in entries(key_indices, key.shape[2]))
        shape = (*scores.shape[:-1], key_indices.shape[1])
        scores = torch.where(valid, scores.take_along_dim(index, -1), 0.0) if key.shape[2] else scores.new_zeros(shape)
    scores = scores if head_reduction == "none" else scores.squeeze(2)
    return scores.squeeze(1) if "+" not in query_reduction else scores


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
) -> tuple[Tensor, Tensor]:
    """Entropy and log-sum-exp of every row over its visible keys, both [B, Hq, M]."""
    logits = _hide(_logits(query, key, scale, cosine), key_mask, query_positions, causal)
    lse = logits.logsumexp(-1)
    return _entropy(logits, lse), lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_entropy` and, from its lse, `attention_scores`: (scores, entropy, lse)."""
    entropy, lse = attention_entropy(
        query, key, key_mask=key_mask, query_positions=query_positions, scale=scale, causal=causal, cosine=cosine
    )
    scores = attention_scores(
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
    return scores, entropy, lse
