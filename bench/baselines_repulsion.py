"""The eager loops that repulsion_sample is measured against, restated from their formulas for one sample [1, N, C].

Both start from the full cosine Gram matrix. `published` is max-min diversity selection as it is usually written: every
step takes the rows of all selected tokens again. `incremental` keeps the running aggregate instead, which is what a
careful author would write; it is the stronger baseline.
"""

import torch
from torch import Tensor


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features[0].float(), dim=-1)


def _outlier(unit: Tensor) -> Tensor:
    return (unit @ torch.nn.functional.normalize(unit.sum(0), dim=0)).argmin()


def published(features: Tensor, k: int) -> Tensor:
    """arg max over the tokens left of min over the selected of (1 - cosine), from the selected rows anew each step."""
    unit = _unit(features)
    distance = 1 - unit @ unit.T
    selected = torch.empty(k, dtype=torch.int64, device=features.device)
    selected[0] = _outlier(unit)
    for step in range(1, k):
        nearest = distance[selected[:step]].amin(0)
        nearest[selected[:step]] = -1
        selected[step] = nearest.argmax()
    return selected


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
