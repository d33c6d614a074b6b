"""What several references share: the arithmetic dtype, unit vectors, index lists and the order of candidates."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """The dtype the contract computes in: float64 stays float64, everything narrower becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def normalize(x: Tensor) -> Tensor:
    """x / max(||x||, 1e-12) along the last dimension, so that a zero vector has cosine 0 with everything."""
    x = widen(x)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(1e-12)


def squared_distances(positions: Tensor) -> Tensor:
    """||p_i - p_j||^2 from differences, which stays exact on integer grids."""
    p = widen(positions)
    return (p.unsqueeze(2) - p.unsqueeze(1)).square().sum(-1)


def row_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||^2 of [B, N, C] and [B, M, C] from differences, a column at a time: [B, N, M, C] would not fit."""
    x, y = widen(x), widen(y)
    columns = [(x - y[:, j : j + 1]).square().sum(-1) for j in range(y.shape[1])]
    return torch.stack(columns, dim=-1) if columns else x.new_zeros(*x.shape[:2], 0)


def ones_like_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """`mask`, or all True over the shape of x."""
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask


def entries(indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A -1 padded index list as (indices safe to gather with, True where there is an entry)."""
    outside = (indices < -1) | (indices >= size)
    if not torch.compiler.is_compiling() and bool(outside.any()):
        raise IndexError(f"indices must lie in [-1, {size}), got {indices[outside][0].item()}")
    return indices.clamp(min=0), indices >= 0


def candidate_order(value: Tensor, mask: Tensor, largest: bool = True) -> Tensor:
    """Positions from best to worst along the last dimension: by value, ties by lower index, NaN last, then masked."""
    value = widen(value) if largest else -widen(value)
    group = torch.where(mask, value.isnan().int(), 2)
    by_value = value.nan_to_num(0.0, torch.inf, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return by_value.gather(-1, group.gather(-1, by_value).argsort(dim=-1, stable=True))


def best_candidate(value: Tensor, mask: Tensor, largest: bool = True) -> Tensor:
    """The first entry of `candidate_order` as [..., 1], or -1 where the mask is all False."""
    number = mask & ~value.isnan()
    worst = -torch.inf if largest else torch.inf
    clean = torch.where(number, value, worst)
    best = clean.amax(-1, keepdim=True) if largest else clean.amin(-1, keepdim=True)
    tied = torch.where(number.any(-1, keepdim=True), number & (clean == best), mask)
    position = torch.arange(value.shape[-1], device=value.device)
    first = torch.where(tied, position, value.shape[-1]).amin(-1, keepdim=True)
    return torch.where(mask.any(-1, keepdim=True), first, -1)
