"""Spatial-semantic non-maximum suppression, one pick per step."""

import torch
from torch import Tensor

from ._common import best_candidate, normalize, ones_like_mask, widen


def spatial_semantic_nms(
    scores: Tensor,
    features: Tensor,
    positions: Tensor,
    k: int,
    *,
    groups: Tensor | None = None,
    mask: Tensor | None = None,
    radius: float = 5.0,
    sigma_spatial: float = 1.5,
    sigma_semantic: float = 0.05,
    mode: str = "soft",
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdaptPrune (arXiv 2503.08019): pick the best token, then weaken the similar tokens around it, k times."""
    batch, n, _ = features.shape
    score, unit, coordinates = widen(scores), normalize(features), widen(positions)
    available = ones_like_mask(scores, mask)
    indices = scores.new_full((batch, k), -1, dtype=torch.int64)
    selected_scores = torch.zeros(batch, k, dtype=score.dtype, device=score.device)
    token = torch.arange(n, device=scores.device)
    for step in range(min(k, n)):
        pick = best_candidate(score, available)
        m = pick.clamp_min(0)
        indices[:, step] = pick.squeeze(-1)
        selected_scores[:, step] = torch.where(pick >= 0, score.gather(1, m), 0.0).squeeze(-1)
        d2 = (coordinates - coordinates.take_along_dim(m.unsqueeze(-1), dim=1)).square().sum(-1)
        cosine = (unit @ unit.take_along_dim(m.unsqueeze(-1), dim=1).mT).squeeze(-1)
        spatial = torch.exp(-d2 / (2.0 * sigma_spatial * sigma_spatial))
        w = spatial * torch.exp(-((1 - cosine) ** 2) / (2.0 * sigma_semantic * sigma_semantic))
        near = d2.sqrt() <= radius
        if groups is not None:
            near = near & (groups == groups.gather(1, m))
        if mode == "soft":
            score = torch.where(near, score * (1 - w), score)
        else:
            available = available & ~(near & (w >= threshold))
        available = available & (token != pick)
    return indices, selected_scores, (indices >= 0).sum(-1)
