"""Selecting tokens from scores: top-k, two-tailed, mixture, mask compaction, and the entropy of a score vector."""

import math

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


def _best(scores: Tensor, mask: Tensor, count: int | Tensor, largest: bool = True) -> Tensor:
    """True for the `count` best tokens of each sample."""
    rank = candidate_order(scores, mask, largest).argsort(dim=-1)
    return mask & (rank < count)


def select_topk(scores: Tensor, k: int, *, mask: Tensor | None = None, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k best tokens of each sample, in ascending order of position."""
    return mask_to_indices(_best(scores, ones_like_mask(scores, mask), k, largest), k)


def select_two_tailed(scores: Tensor, num_low: Tensor, k: int, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k - n highest tokens and the n lowest of the others, n = clamp(num_low, 0, k)."""
    mask = ones_like_mask(scores, mask)
    low = num_low.clamp(0, k).unsqueeze(-1)
    high = _best(scores, mask, k - low)
    return mask_to_indices(high | _best(scores, mask & ~high, low, largest=False), k)


def select_mixture(
    text_scores: Tensor, visual_scores: Tensor, k: int, *, floor: float = 0.25, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """AdaFV (arXiv 2501.09532): share k between two rankings so that the product of their collected mass is largest."""
    mask = ones_like_mask(text_scores, mask)
    clean = (s.double().nan_to_num(0.0, torch.inf, 0.0).clamp_min(0) for s in (text_scores, visual_scores))
    text, visual = (torch.where(mask, s, 0.0) for s in clean)
    reserved = math.floor(floor * k)
    rest = k - 2 * reserved
    text_rank, visual_rank = (candidate_order(s, mask).argsort(dim=-1) for s in (text, visual))

    def mass(scores: Tensor) -> Tensor:  # [B, rest + 1]: what the next 0..rest tokens after the reserved ones add up to
        after = candidate_order(scores, mask)[:, reserved : reserved + rest]
        collected = torch.nn.functional.pad(scores.gather(-1, after).cumsum(-1), (1, 0))
        return torch.nn.functional.pad(collected, (0, rest + 1 - collected.shape[1]), value=0.0).cummax(-1).values

    product = (mass(text) * mass(visual).flip(-1)).nan_to_num(0.0, torch.inf)
    split = torch.arange(rest + 1, device=mask.device)
    r = torch.where(product == product.amax(-1, keepdim=True), split, rest + 1).amin(-1, keepdim=True)
    chosen = mask & ((text_rank < reserved + r) | (visual_rank < reserved + rest - r))

    share = torch.maximum(*(torch.nan_to_num(s / s.sum(-1, keepdim=True), 0.0) for s in (text, visual)))
    free = k - chosen.sum(-1, keepdim=True)
    indices, counts = mask_to_indices(chosen | _best(share, mask & ~chosen, free), k)
    return indices, counts, reserved + r.squeeze(-1)


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
