"""Published selection loops, restated from their formulas for one image: what `make bench` and `bench --quick` time."""

import torch
from torch import Tensor


def nms(
    scores: Tensor,
    features: Tensor,
    positions: Tensor,
    k: int,
    radius: float = 5.0,
    sigma_spatial: float = 1.5,
    sigma_semantic: float = 0.05,
) -> Tensor:
    """AdaptPrune (arXiv 2503.08019): [N], [N, C], [N, 2] -> the k picks.

    Each step reads the argmax back and updates all N tokens.
    """
    s = scores.float().clone()
    directions = torch.nn.functional.normalize(features.float(), dim=-1)
    coordinates = positions.float()
    picks = []
    for _ in range(k):
        m = int(torch.argmax(s).item())
        picks.append(m)
        distance = (coordinates - coordinates[m]).norm(dim=-1)
        cosine = directions @ directions[m]
        near = distance <= radius
        spatial = torch.exp(-(distance[near] ** 2) / (2 * sigma_spatial**2))
        semantic = torch.exp(-((1 - cosine[near]) ** 2) / (2 * sigma_semantic**2))
        s[near] = s[near] * (1 - spatial * semantic)
        s[m] = -torch.inf
    return torch.tensor(picks, dtype=torch.int64)


def unit(features: Tensor) -> Tensor:
    """[N, C] float32 of [1, N, C]: directions."""
    return torch.nn.functional.normalize(features[0].float(), dim=-1)


def outlier(directions: Tensor) -> Tensor:
    """The token that is least like their mean."""
    return (directions @ torch.nn.functional.normalize(directions.sum(0), dim=0)).argmin()


def max_min(features: Tensor, k: int) -> Tensor:
    """Max-min diversity (DivPrune, arXiv 2503.02175) of [1, N, C], as it is usually written: arg max over the tokens
    left of min over the selected of (1 - cosine), from the selected rows anew each step."""
    directions = unit(features)
    distance = 1 - directions @ directions.T
    selected = torch.empty(k, dtype=torch.int64, device=features.device)
    selected[0] = outlier(directions)
    for step in range(1, k):
        nearest = distance[selected[:step]].amin(0)
        nearest[selected[:step]] = -1
        selected[step] = nearest.argmax()
    return selected
