"""AdaFV's mixture of two rankings."""

import math

import torch
from torch import Tensor

from ._common import candidate_order, ones_like_mask
from .selection import best, mask_to_indices


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
    indices, counts = mask_to_indices(chosen | best(share, mask & ~chosen, free), k)
    return indices, counts, reserved + r.squeeze(-1)
