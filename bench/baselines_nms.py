"""AdaptPrune's selection loop, restated from its formulas (arXiv 2503.08019): what the op is compared with."""

import torch
from torch import Tensor


def published_loop(
    scores: Tensor,
    features: Tensor,
    positions: Tensor,
    k: int,
    radius: float = 5.0,
    sigma_spatial: float = 1.5,
    sigma_semantic: float = 0.05,
) -> Tensor:
    """One image: [N], [N, C], [N, 2] -> the k picks. Each step reads the argmax back and updates all N tokens."""
    s = scores.float().clone()
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    coordinates = positions.float()
    picks = []
    for _ in range(k):
        m = int(torch.argmax(s).item())
        picks.append(m)
        distance = (coordinates - coordinates[m]).norm(dim=-1)
        cosine = unit @ unit[m]
        near = distance <= radius
        spatial = torch.exp(-(distance[near] ** 2) / (2 * sigma_spatial**2))
        semantic = torch.exp(-((1 - cosine[near]) ** 2) / (2 * sigma_semantic**2))
        s[near] = s[near] * (1 - spatial * semantic)
        s[m] = -torch.inf
    return torch.tensor(picks, dtype=torch.int64)
