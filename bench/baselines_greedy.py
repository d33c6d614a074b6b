"""The published loops of dpp_sample (CDPruner) and coverage_sample (SCOPE), restated from their formulas."""

import torch
from torch import Tensor


def dpp(features: Tensor, quality: Tensor, k: int) -> Tensor:
    """The whole kernel first, then one row of its Cholesky factor a step, over all tokens."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    kernel = quality.unsqueeze(2) * (unit @ unit.mT) * quality.unsqueeze(1)
    batch, n, _ = kernel.shape
    sample = torch.arange(batch, device=features.device)
    factor, gain = kernel.new_zeros(k, batch, n), kernel.diagonal(dim1=1, dim2=2).clone()
    picks = torch.empty(batch, k, dtype=torch.int64, device=features.device)
    for step in range(k):
        j = gain.argmax(-1)
        picks[:, step] = j
        earlier = torch.einsum("sb,sbn->bn", factor[:step, sample, j], factor[:step])
        factor[step] = (kernel[sample, j] - earlier) / gain[sample, j].sqrt().unsqueeze(-1)
        gain -= factor[step].square()
        gain[sample, j] = -torch.inf
    return picks


def coverage(similarity: Tensor, quality: Tensor, k: int) -> Tensor:
    """The gains of all tokens over all rows anew in every step."""
    batch, rows, _ = similarity.shape
    sample = torch.arange(batch, device=similarity.device)
    covered, taken = similarity.new_zeros(batch, rows, 1), torch.zeros_like(quality, dtype=torch.bool)
    picks = torch.empty(batch, k, dtype=torch.int64, device=similarity.device)
    for step in range(k):
        gain = (similarity - covered).clamp_min(0).sum(1) * quality
        j = gain.masked_fill(taken, -torch.inf).argmax(-1)
        picks[:, step] = j
        taken[sample, j] = True
        covered = torch.maximum(covered, similarity[sample, :, j].unsqueeze(-1))
    return picks
