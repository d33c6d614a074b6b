"""Cosine similarity of visual tokens to queries or partners, and COAST's contrast between anchors and references."""

import torch
from torch import Tensor

from ._common import entries, normalize


def _reduce(similarity: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """max or mean of similarity [B, N, M] over the valid [B, M] entries; 0 where there is none."""
    valid = valid.unsqueeze(1)
    if reduction == "mean":
        return torch.where(valid, similarity, 0).sum(-1) / valid.sum(-1).clamp_min(1)
    if similarity.shape[-1] == 0:
        return similarity.new_zeros(similarity.shape[:-1])
    return torch.where(valid.any(-1), torch.where(valid, similarity, -torch.inf).amax(-1), 0)


def cosine_scores(
    features: Tensor, queries: Tensor, *, query_mask: Tensor | None = None, reduction: str = "max"
) -> Tensor:
    """max or mean over the valid queries of cos(feature, query): [B, N, C], [B, M, C] -> [B, N]."""
    valid = queries.new_ones(queries.shape[:2], dtype=torch.bool) if query_mask is None else query_mask
    return _reduce(normalize(features) @ normalize(queries).mT, valid, reduction)


def paired_cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a_i, b_i): [B, N, C] twice -> [B, N]."""
    return (normalize(a) * normalize(b)).sum(-1)


def contrastive_scores(features: Tensor, anchor_indices: Tensor, reference_indices: Tensor) -> Tensor:
    """COAST (arXiv 2605.09429): max over anchors of cos(f_j, f_a) minus mean over references of cos(f_j, f_r)."""
    unit = normalize(features)

    def to_listed(indices: Tensor, reduction: str) -> Tensor:
        index, valid = entries(indices, features.shape[1])
        shape = (*index.shape, unit.shape[2])
        listed = unit.take_along_dim(index.unsqueeze(-1), dim=1) if unit.shape[1] else unit.new_zeros(shape)
        return _reduce(unit @ listed.mT, valid, reduction)

    return to_listed(anchor_indices, "max") - to_listed(reference_indices, "mean")
