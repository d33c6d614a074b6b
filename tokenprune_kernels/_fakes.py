"""Shapes, dtypes and strides of every op's outputs, for torch.compile, export and meta tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _scores_shape(query: Tensor, key: Tensor, key_indices: Tensor | None, heads: str, rows: str) -> list[int]:
    width = key.shape[2] if key_indices is None else key_indices.shape[1]
    per_head = [query.shape[1]] if heads == "none" else []
    return [query.shape[0], rows.count("+") + 1, *per_head, width]


def _selection(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    batch = scores.shape[0]
    return scores.new_empty((batch, k), dtype=torch.int64), scores.new_empty((batch,), dtype=torch.int64)


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
) -> tuple[Tensor, Tensor]:
    _checks.attention("attention_entropy", query, key, None, None, None, key_mask, query_positions, "mean", "mean")
    shape = query.shape[:3]
    return query.new_empty(shape, dtype=_wide(query)), query.new_empty(shape, dtype=_wide(query))


def attention_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    key_indices: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    head_reduction: str = "mean",
    query_reduction: str = "mean",
) -> Tensor:
    _checks.attention(
        "attention_scores",
        query, key, lse, key_indices, query_mask, key_mask, query_positions, head_reduction, query_reduction,
    )  # fmt: skip
    return query.new_empty(_scores_shape(query, key, key_indices, head_reduction, query_reduction), dtype=_wide(query))


def cross_attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    key_indices: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    head_reduction: str = "mean",
    query_reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.attention(
        "cross_attention_scores",
        query, key, None, key_indices, query_mask, key_mask, query_positions, head_reduction, query_reduction,
    )  # fmt: skip
    scores = query.new_empty(
        _scores_shape(query, key, key_indices, head_reduction, query_reduction), dtype=_wide(query)
    )
    shape = query.shape[:3]
    return scores, query.new_empty(shape, dtype=_wide(query)), query.new_empty(shape, dtype=_wide(query))


def score_entropy(scores: Tensor, *, mask: Tensor | None = None, normalized: bool = True) -> Tensor:
    _checks.score_entropy(scores, mask)
    return scores.new_empty((scores.shape[0],), dtype=_wide(scores))


def cosine_scores(
    features: Tensor, queries: Tensor, *, query_mask: Tensor | None = None, reduction: str = "max"
) -> Tensor:
    _checks.cosine_scores(features, queries, query_mask, reduction)
    return features.new_empty(features.shape[:2], dtype=_wide(features))


def contrastive_scores(features: Tensor, anchor_indices: Tensor, reference_indices: Tensor) -> Tensor:
    _checks.contrastive_scores(features, anchor_indices, reference_indices)
    return features.new_empty(features.shape[:2], dtype=_wide(features))


def select_topk(scores: Tensor, k: int, *, mask: Tensor | None = None, largest: bool = True) -> tuple[Tensor, Tensor]:
    _checks.select_topk(scores, k, mask)
    return _selection(scores, k)


def select_two_tailed(scores: Tensor, num_low: Tensor, k: int, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _checks.select_two_tailed(scores, num_low, k, mask)
    return _selection(scores, k)


def select_mixture(
    text_scores: Tensor, visual_scores: Tensor, k: int, *, floor: float = 0.25, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.select_mixture(text_scores, visual_scores, k, floor, mask)
    return *_selection(text_scores, k), text_scores.new_empty((text_scores.shape[0],), dtype=torch.int64)


def mask_to_indices(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    _checks.mask_to_indices(mask, capacity)
    return _selection(mask, capacity)


def repulsion_sample(
    features: Tensor,
    k: int,
    *,
    positions: Tensor | None = None,
    seed_indices: Tensor | None = None,
    energy: Tensor | None = None,
    mask: Tensor | None = None,
    potential: str = "cosine",
    aggregate: str = "max",
    feature_weight: float = 1.0,
    position_weight: float = 1.0,
    exponent: float = 1.0,
    sigma: float = 1.0,
    epsilon: float = 1e-6,
    first: str = "outlier",
) -> tuple[Tensor, Tensor]:
    _checks.repulsion_sample(
        features, k, positions, seed_indices, energy, mask,
        potential, aggregate, feature_weight, position_weight, exponent, sigma, epsilon, first,
    )  # fmt: skip
    return _selection(features, k)


def spatial_semantic_nms(
    scores: Tensor,
    features: Tensor,
    positions: Tensor,
    k: int,
    *,
    groups: Tensor | None = None,
    mask: Tensor | None = None,
    radius: float = 5.0,
    sigma_spatial: float = 1.5,
    sigma_semantic: float = 0.05,
    mode: str = "soft",
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.spatial_semantic_nms(
        scores, features, positions, k, groups, mask,
        radius, sigma_spatial, sigma_semantic, mode, threshold,
    )  # fmt: skip
    indices, counts = _selection(scores, k)
    return indices, scores.new_empty((scores.shape[0], k), dtype=_wide(scores)), counts


def gather_compact(
    tensors: Sequence[Tensor], indices: Tensor, *, dims: Sequence[int], batch_dims: Sequence[int] | None = None
) -> list[Tensor]:
    _checks.gather_compact(tensors, indices, dims, batch_dims)
    kept = []
    for t, dim in zip(tensors, dims, strict=True):
        shape = list(t.shape)
        shape[dim] = indices.shape[1]
        kept.append(t.new_empty(shape))
    return kept


def _invert_indices(indices: Tensor, size: int) -> Tensor:
    _checks.invert_indices(indices, size)
    return indices.new_empty((indices.shape[0], size))
