"""Repulsion sampling, one pick per step."""

import torch
from torch import Tensor

from ._common import best_candidate, entries, normalize, ones_like_mask, squared_distances, widen


def _first_objective(cosine: Tensor, unit: Tensor, valid: Tensor, first: str) -> Tensor:
    """What the very first pick minimises when there is neither a seed nor an energy."""
    if first == "index" or not valid.shape[1]:
        return cosine.new_zeros(valid.shape)
    if first == "outlier":
        total = torch.where(valid.unsqueeze(-1), unit, 0).sum(1, keepdim=True)
        return (unit @ normalize(total).mT).squeeze(-1)
    others = valid.unsqueeze(1) & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return torch.where(others, cosine, -torch.inf).amax(-1)


def repulsion_sample(
    features: Tensor,
    k: int,
    *,
    positions: Tensor | None = None,
    seed_indices: Tensor | None = None,
    energy: Tensor | None = None,
    mask: Tensor | None = None,
    potential: str = "cosine",
    aggregate: str = "max",
    feature_weight: float = 1.0,
    position_weight: float = 1.0,
    exponent: float = 1.0,
    sigma: float = 1.0,
    epsilon: float = 1e-6,
    first: str = "outlier",
) -> tuple[Tensor, Tensor]:
    """Repeatedly pick the token with the smallest U(i) = aggregate over the selected j of phi(i, j), plus energy(i)."""
    batch, n, _ = features.shape
    unit = normalize(features)
    cosine = unit @ unit.mT
    r2 = feature_weight * 2 * (1 - cosine)
    if positions is not None:
        r2 = r2 + position_weight * squared_distances(positions)
    if potential == "cosine":
        phi = cosine
    elif potential == "riesz":
        phi = 1 / (r2.clamp_min(0) ** (exponent / 2) + epsilon)
    else:
        phi = torch.exp(-r2 / (2.0 * sigma * sigma))  # a huge sigma ** 2 raises, the product is inf

    valid = ones_like_mask(features.new_empty(batch, n), mask)
    selected = torch.zeros_like(valid)
    if seed_indices is not None:
        index, entry = entries(seed_indices, n)
        if n:
            selected = selected.long().scatter_reduce(1, index, entry.long(), "amax").bool()
    started = selected.any(-1, keepdim=True)  # is anything selected yet?
    own = phi.new_zeros(batch, n) if energy is None else widen(energy).to(phi.dtype)
    start = own if energy is not None else _first_objective(cosine, unit, valid, first)
    of_seeds = torch.where(selected.unsqueeze(1), phi, -torch.inf if aggregate == "max" else 0.0)
    total = (of_seeds.amax(-1) if n else of_seeds.sum(-1)) if aggregate == "max" else of_seeds.sum(-1)

    indices = features.new_full((batch, k), -1, dtype=torch.int64)
    for step in range(min(k, n)):
        pick = best_candidate(torch.where(started, total + own, start), valid & ~selected, largest=False)
        indices[:, step] = pick.squeeze(-1)
        new = phi.take_along_dim(pick.clamp_min(0).unsqueeze(-1), dim=2).squeeze(-1)
        before = total if aggregate == "sum" else torch.where(started, total, -torch.inf)
        total = before + new if aggregate == "sum" else torch.maximum(before, new)
        started = started | (pick >= 0)
        selected = selected.scatter(1, pick.clamp_min(0), True) | (pick < 0)
    return indices, (indices >= 0).sum(-1)
