"""The eager loops that repulsion_sample is measured against, restated from their formulas for one sample [1, N, C].

Both start from the full cosine Gram matrix. `published` is max-min diversity selection as it is usually written: every
step takes the rows of all selected tokens again. `incremental` keeps the running aggregate instead, which is what a
careful author would write; it is the stronger baseline.
"""

import torch
from torch import Tensor

from tokenprune_kernels.quick.loops import max_min as published
from tokenprune_kernels.quick.loops import outlier as _outlier
from tokenprune_kernels.quick.loops import unit as _unit

__all__ = ["energy_minimisation", "incremental", "published"]


def incremental(features: Tensor, k: int, *, isolated: bool = False) -> Tensor:
    """The same picks with a running maximum of the cosines."""
    unit = _unit(features)
    cosine = unit @ unit.T
    if isolated:
        cosine.fill_diagonal_(-torch.inf)
        pick = cosine.amax(1).argmin()
    else:
        pick = _outlier(unit)
    selected = torch.empty(k, dtype=torch.int64, device=features.device)
    selected[0] = pick
    running = cosine[pick].clone()
    running[pick] = torch.inf
    for step in range(1, k):
        pick = running.argmin()
        selected[step] = pick
        torch.maximum(running, cosine[pick], out=running)
        running[pick] = torch.inf
    return selected


def energy_minimisation(features: Tensor, positions: Tensor, k: int) -> Tensor:
    """Riesz potentials with exponent 1, summed over the selected tokens, with a running sum."""
    unit = _unit(features)
    coordinates = positions[0]
    squares = coordinates.square().sum(1)
    r2 = 2 * (1 - unit @ unit.T) + (squares[:, None] + squares - 2 * coordinates @ coordinates.T)
    phi = 1 / (r2.clamp_min_(0).sqrt_() + 1e-6)
    selected = torch.empty(k, dtype=torch.int64, device=features.device)
    pick = selected[0] = _outlier(unit)
    running = phi[pick].clone()
    running[pick] = torch.inf
    for step in range(1, k):
        pick = running.argmin()
        selected[step] = pick
        running += phi[pick]
        running[pick] = torch.inf
    return selected
