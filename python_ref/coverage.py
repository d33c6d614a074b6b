"""Greedy facility location: the tokens that together cover all rows best."""

import torch
from torch import Tensor

from ._common import best_candidate, ones_like_mask, widen


def _positive(x: Tensor) -> Tensor:
    """NaN and negative values count as 0."""
    return torch.where(x > 0, widen(x), 0)


def coverage_sample(
    similarity: Tensor,
    k: int,
    *,
    row_weights: Tensor | None = None,
    quality: Tensor | None = None,
    row_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Repeatedly pick the token n with the largest quality_n * sum_r weight_r * max(similarity[r, n] - C_r, 0)."""
    batch, rows, n = similarity.shape
    covers = _positive(similarity)
    weight = covers.new_ones(batch, rows) if row_weights is None else _positive(row_weights).to(covers.dtype)
    if row_mask is not None:
        weight = torch.where(row_mask, weight, 0)
    q = covers.new_ones(batch, n) if quality is None else _positive(quality).to(covers.dtype)
    covered = covers.new_zeros(batch, rows, 1)  # C_r
    free = ones_like_mask(q, mask)
    indices = similarity.new_full((batch, k), -1, dtype=torch.int64)
    gains = covers.new_zeros(batch, k)
    for step in range(min(k, n)):
        gain = q * (weight.unsqueeze(-1) * (covers - covered).clamp_min(0)).sum(1)
        pick = best_candidate(gain, free)
        j = pick.clamp_min(0)
        indices[:, step] = pick.squeeze(1)
        gains[:, step] = torch.where(pick >= 0, gain.gather(1, j), 0).squeeze(1)
        covered = torch.maximum(covered, covers.take_along_dim(j.unsqueeze(1), dim=2))
        free = free.scatter(1, j, False) & (pick >= 0)
    return indices, gains, (indices >= 0).sum(-1)
