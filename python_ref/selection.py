"""Selecting tokens from scores: top-k, two-tailed, mask compaction, and the entropy of a score vector."""

import torch
from torch import Tensor

from ._common import candidate_order, ones_like_mask, widen


def mask_to_indices(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Positions of True in ascending order, padded with -1 to [B, capacity], and how many there are."""
    batch, n = mask.shape
    position = torch.where(mask, torch.arange(n, device=mask.device), n).sort(dim=-1).values[:, :capacity]
    indices = mask.new_full((batch, capacity), -1, dtype=torch.int64)
    indices[:, : position.shape[1]] = torch.where(position < n, position, -1)
    return indices, mask.sum(-1).clamp(max=capacity)


def best(scores: Tensor, mask: Tensor, count: int | Tensor, largest: bool = True) -> Tensor:
    """True for the `count` best tokens of each sample."""
    rank = candidate_order(scores, mask, largest).argsort(dim=-1)
    return mask & (rank < count)


def select_topk(
    scores: Tensor, k: int, *, mask: Tensor | None = None, largest: bool = True, budgets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best tokens of each sample, or its `budgets` best, in ascending order of position."""
    count = k if budgets is None else budgets.clamp(0, k).unsqueeze(-1)
    return mask_to_indices(best(scores, ones_like_mask(scores, mask), count, largest), k)


def select_grouped_topk(
    scores: Tensor, groups: Tensor, budgets: Tensor, k: int, *, mask: Tensor | None = None, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """The budgets[b, g] best tokens of every group g, all groups together in ascending order of position."""
    mask = ones_like_mask(scores, mask)
    chosen = torch.zeros_like(mask)
    for g in range(budgets.shape[1]):
        chosen |= best(scores, mask & (groups == g), budgets[:, g : g + 1], largest)
    return mask_to_indices(chosen, k)


def select_two_tailed(scores: Tensor, num_low: Tensor, k: int, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k - n highest tokens and the n lowest of the others, n = clamp(num_low, 0, k)."""
    mask = ones_like_mask(scores, mask)
    low = num_low.clamp(0, k).unsqueeze(-1)
    high = best(scores, mask, k - low)
    return mask_to_indices(high | best(scores, mask & ~high, low, largest=False), k)


def score_entropy(scores: Tensor, *, mask: Tensor | None = None, normalized: bool = True) -> Tensor:
    """H = -sum p log p of p = max(s, 0) / sum over the masked tokens; `normalized` divides by log(number of tokens)."""
    mask = ones_like_mask(scores, mask)
    scores = torch.where(mask, widen(scores).nan_to_num(0.0, torch.inf, 0.0).clamp_min(0), 0.0)
    n = mask.sum(-1).to(scores.dtype)
    total = scores.sum(-1, keepdim=True)
    p = torch.where(total > 0, scores / total, mask / n.clamp_min(1).unsqueeze(-1))
    entropy = -torch.special.xlogy(p, p).sum(-1)
    if normalized:
        entropy = (entropy / n.log()).clamp(0, 1)
    return torch.where(n <= 1, 0.0, entropy)
