"""Cosine similarity of visual tokens to queries, and COAST's contrast between anchors and references."""

from torch import Tensor

from .. import _checks
from .._backend import implementation


def cosine_scores(
    features: Tensor,
    queries: Tensor,
    *,
    query_mask: Tensor | None = None,
    reduction: str = "max",
    backend: str | None = None,
) -> Tensor:
    """max or mean over the valid queries of cos(feature, query): [B, N, C], [B, M, C] -> [B, N]."""
    _checks.cosine_scores(features, queries, query_mask, reduction)
    result: Tensor = implementation(backend, features).cosine_scores(
        features, queries, query_mask=query_mask, reduction=reduction
    )
    return result


def contrastive_scores(
    features: Tensor, anchor_indices: Tensor, reference_indices: Tensor, *, backend: str | None = None
) -> Tensor:
    """max over anchors of cos(f_j, f_a) minus mean over references of cos(f_j, f_r): [B, N]."""
    _checks.contrastive_scores(features, anchor_indices, reference_indices)
    result: Tensor = implementation(backend, features).contrastive_scores(features, anchor_indices, reference_indices)
    return result
