"""Greedy MAP inference of a determinantal point process, by the incremental Cholesky factor of its kernel."""

import torch
from torch import Tensor

from ._common import best_candidate, normalize, ones_like_mask, widen


def dpp_sample(
    features: Tensor, k: int, *, quality: Tensor | None = None, mask: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Repeatedly pick the token that adds most to the determinant of L_ij = q_i q_j cos(f_i, f_j) over the picks."""
    batch, n, _ = features.shape
    unit = normalize(features)
    q = unit.new_ones(batch, n) if quality is None else widen(quality).to(unit.dtype)
    kernel = q.unsqueeze(2) * q.unsqueeze(1) * (unit @ unit.mT)
    # d2_i is what token i would multiply the determinant by.
    d2 = torch.where(q.isfinite(), kernel.diagonal(dim1=1, dim2=2), torch.nan)
    free = ones_like_mask(d2, mask)
    factor = unit.new_zeros(batch, n, min(k, n))  # c_i, one entry per pick
    indices = features.new_full((batch, k), -1, dtype=torch.int64)
    gains = unit.new_zeros(batch, k)
    for step in range(min(k, n)):
        pick = best_candidate(d2, free)
        j = pick.clamp_min(0)
        gain = d2.gather(1, j)
        row = kernel.take_along_dim(j.unsqueeze(-1), dim=1).squeeze(1)
        c_j = factor.take_along_dim(j.unsqueeze(-1), dim=1)
        e = (row - (factor * c_j).sum(-1)) / gain.sqrt()
        # Beyond the rank of the kernel a gain is a rounding error, which nothing may be divided by.
        e = torch.where((pick >= 0) & (gain > epsilon * q.gather(1, j).square()), e, 0)
        factor[:, :, step] = e
        d2 = d2 - e.square()
        indices[:, step] = pick.squeeze(1)
        gains[:, step] = torch.where(pick >= 0, gain, 0).squeeze(1)
        free = free.scatter(1, j, False) & (pick >= 0)
    return indices, gains, (indices >= 0).sum(-1)
