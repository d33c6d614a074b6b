"""Density peaks: cluster centres are dense tokens far from every denser one (DPC-kNN)."""

import torch
from torch import Tensor

from ._common import ones_like_mask, row_distances
from .selection import select_topk


def density_peaks(
    features: Tensor, k: int, *, neighbors: int = 5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k tokens with the largest density times distance to a denser token, with their densities and distances."""
    batch, n, channels = features.shape
    valid = ones_like_mask(features.new_empty(batch, n), mask)
    squares = row_distances(features, features)
    # A distance that is not a number, as to a token with NaN, is not there.
    pair = valid.unsqueeze(2) & valid.unsqueeze(1) & ~squares.isnan()
    nearest = torch.where(pair, squares, torch.inf).sort(dim=-1).values[:, :, :neighbors]
    found = pair.sum(-1).clamp_max(neighbors)
    is_found = torch.arange(nearest.shape[-1], device=features.device) < found.unsqueeze(-1)
    mean = torch.where(is_found, nearest, 0).sum(-1) / (found * max(channels, 1))  # m_i, NaN without a neighbour

    index = torch.arange(n, device=features.device)
    m_i, m_j = mean.unsqueeze(2), mean.unsqueeze(1)
    denser = pair & ((m_j < m_i) | ((m_j == m_i) & (index < index.unsqueeze(-1))))
    closest, widest = (torch.where(which, squares, value) for which, value in ((denser, torch.inf), (pair, 0.0)))
    if n:  # a maximum needs something
        alone = widest.amax((1, 2), keepdim=True).squeeze(-1)  # what the densest token gets
        closest = torch.where(denser.any(-1), closest.amin(-1), alone)
    distance = (closest.reshape(batch, n) / max(channels, 1)).sqrt()
    indices, counts = select_topk(distance.log() - mean, k, mask=valid)
    density, distance = (torch.where(valid, x, 0).contiguous() for x in (torch.exp(-mean), distance))
    return indices, counts, density, distance
