"""Inputs of every op's sample calls, by name.

Values are exactly representable: small integers, and feature vectors of {0, 1, -1} whose norm is a power of two. Index
outputs therefore have to be identical on every backend, and float outputs may differ by a few roundings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    tokens: int = 37  # N
    rows: int = 5  # M: query rows, or text tokens
    channels: int = 72  # C, or D per head
    heads: int = 4
    kv_heads: int = 2
    k: int = 9
    listed: int = 6  # entries of an index list: V, A, R or S
    axes: int = 2  # coordinates of a position


def integers(low: int, high: int, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Integers in [low, high), which every dtype represents."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flags(*shape: int, seed: int) -> Tensor:
    """About three quarters True."""
    return integers(0, 4, *shape, dtype=torch.int64, seed=seed) > 0


def index_list(size: int, *shape: int, seed: int) -> Tensor:
    """Positions below size, and some -1."""
    return integers(-1, size, *shape, dtype=torch.int64, seed=seed)


def features(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Vectors of 16, 4 or 1 entries of 1 or -1 among zeros: their norms are 4, 2 or 1, their cosines exact."""
    channels = shape[-1]
    ones = 16 if channels >= 32 else 4 if channels >= 8 else min(channels, 1)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator).argsort(-1) < ones
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (kept * sign).to(dtype)


def _attention(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    query = integers(-2, 3, s.batch, s.heads, s.rows, s.channels, dtype=dtype, seed=1)
    return {"query": query, "key": integers(-2, 3, s.batch, s.kv_heads, s.tokens, s.channels, dtype=dtype, seed=2)}


def _visible(s: Sizes) -> dict[str, Any]:
    positions = integers(0, max(s.tokens, 1), s.batch, s.rows, dtype=torch.int64, seed=3)
    return {"key_mask": flags(s.batch, s.tokens, seed=4), "query_positions": positions, "causal": True}


def _reduced(s: Sizes) -> dict[str, Any]:
    listed = index_list(s.tokens, s.batch, s.listed, seed=5)
    return {**_visible(s), "key_indices": listed, "query_mask": flags(s.batch, s.rows, seed=6)}


def _lse(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    lse = integers(
        6, 12, s.batch, s.heads, s.rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=7
    )
    lse[..., :1] = -torch.inf
    return {"lse": lse}


def _scores(s: Sizes, dtype: torch.dtype, low: int = -6, seed: int = 8) -> Tensor:
    return integers(low, 7, s.batch, s.tokens, dtype=dtype, seed=seed)


def _masked(s: Sizes) -> dict[str, Any]:
    return {"mask": flags(s.batch, s.tokens, seed=9)}


def _outlying(s: Sizes, dtype: torch.dtype) -> Tensor:
    """Features of one sign but for one token, which is the outlier by a wide margin."""
    same_sign = features(s.batch, s.tokens, s.channels, dtype=dtype, seed=10).abs()
    same_sign[:, s.tokens // 2 : s.tokens // 2 + 1].neg_()
    return same_sign


def _tokens(s: Sizes, dtype: torch.dtype) -> Tensor:
    return features(s.batch, s.tokens, s.channels, dtype=dtype, seed=11)


def _one_hot(s: Sizes, dtype: torch.dtype) -> Tensor:
    """Cosines of 0 and 1 only, so that sums of potentials are exact too."""
    channel = integers(0, min(max(s.channels, 1), 5), s.batch, s.tokens, dtype=torch.int64, seed=12)
    return torch.nn.functional.one_hot(channel, max(s.channels, 1))[..., : s.channels].to(dtype)


def _grid(s: Sizes, dtype: torch.dtype, axes: int | None = None) -> Tensor:
    return integers(0, 8, s.batch, s.tokens, s.axes if axes is None else axes, dtype=dtype, seed=13)


def _nms(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Distinct scores: a suppressed score then never ties with another one by rounding."""
    order = torch.rand(s.batch, s.tokens, generator=torch.Generator().manual_seed(14)).argsort(-1)
    return {"scores": order.to(dtype), "features": _one_hot(s, dtype), "positions": _grid(s, dtype, 2), "k": s.k}


def _gather(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    hidden = integers(-9, 10, s.batch, s.tokens, s.channels, dtype=dtype, seed=15)
    return {
        "tensors": [
            hidden,
            integers(-9, 10, 3, s.batch, s.tokens, dtype=torch.int64, seed=16),
            flags(s.batch, s.tokens, seed=17),
            integers(-9, 10, s.batch, s.heads, s.tokens, s.channels, dtype=dtype, seed=18),
            integers(-9, 10, s.tokens, s.batch, dtype=torch.int8, seed=19),
        ],
        "indices": torch.stack([_kept(s, b) for b in range(max(s.batch, 1))])[: s.batch],
        "dims": [1, -1, 1, 2, 0],
        "batch_dims": [0, 1, 0, 0, 1],
    }  # fmt: skip


def _kept(s: Sizes, b: int) -> Tensor:
    """Unique positions in ascending order, then -1."""
    order = torch.randperm(s.tokens, generator=torch.Generator().manual_seed(20 + b))[: max(s.k - 2, 0)].sort().values
    return torch.nn.functional.pad(order, (0, s.k - len(order)), value=-1)


def _merge(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Sums of small integers; that they are divided is the only rounding."""
    values = integers(-9, 10, s.batch, s.tokens, s.channels, dtype=dtype, seed=65)
    return {"values": values, "targets": torch.stack([_kept(s, b) for b in range(max(s.batch, 1))])[: s.batch]}


def _frames(video: Tensor) -> dict[str, Any]:
    """A list against itself, one entry later: views of one tensor."""
    return {"a": video[:, 1:], "b": video[:, :-1]}


Factory = Callable[[Sizes, torch.dtype], dict[str, Any]]
FACTORIES: dict[str, dict[str, Factory]] = {
    "cross_attention_scores": {
        "plain": _attention,
        "everything": lambda s, t: {
            **_attention(s, t), **_reduced(s), "scale": 0.25, "head_reduction": "max",
            "query_reduction": "mean+max+last",
        },
        "cosine": lambda s, t: {**_attention(s, t), "cosine": True, "query_reduction": "sum", "head_reduction": "sum"},
        "per_head": lambda s, t: {**_attention(s, t), "head_reduction": "none", "query_reduction": "last"},
        "every_row": lambda s, t: {**_attention(s, t), **_reduced(s), "query_reduction": "none"},
        "one_row_causal": lambda s, t: {**_attention(replace(s, rows=min(s.rows, 1)), t), "causal": True},
    },
    "attention_entropy": {
        "plain": _attention,
        "everything": lambda s, t: {**_attention(s, t), **_visible(s), "scale": 0.25},
        "cosine": lambda s, t: {**_attention(s, t), "cosine": True},
    },
    "attention_scores": {
        "plain": lambda s, t: {**_attention(s, t), **_lse(s, t)},
        "every_row": lambda s, t: {
            **_attention(s, t), **_lse(s, t), "head_reduction": "none", "query_reduction": "none",
            "query_mask": flags(s.batch, s.rows, seed=6),
        },
        "everything": lambda s, t: {
            **_attention(s, t), **_lse(s, t), **_reduced(s), "scale": 0.25, "head_reduction": "none",
            "query_reduction": "max+last",
        },
    },
    "score_entropy": {
        "plain": lambda s, t: {"scores": _scores(s, t)},
        "masked": lambda s, t: {"scores": _scores(s, t), **_masked(s), "normalized": False},
    },
    "cosine_scores": {
        "plain": lambda s, t: {
            "features": _tokens(s, t), "queries": features(s.batch, s.rows, s.channels, dtype=t, seed=30)
        },
        "masked_mean": lambda s, t: {
            "features": _tokens(s, t), "queries": features(s.batch, s.rows, s.channels, dtype=t, seed=30),
            "query_mask": flags(s.batch, s.rows, seed=31), "reduction": "mean",
        },
    },
    "paired_cosine": {
        "plain": lambda s, t: {"a": _tokens(s, t), "b": features(s.batch, s.tokens, s.channels, dtype=t, seed=41)},
        "one_frame_later": lambda s, t: _frames(features(s.batch, s.tokens + 1, s.channels, dtype=t, seed=42)),
    },
    "contrastive_scores": {
        "plain": lambda s, t: {
            "features": _tokens(s, t),
            "anchor_indices": index_list(s.tokens, s.batch, s.listed, seed=32),
            "reference_indices": index_list(s.tokens, s.batch, s.listed + 2, seed=33),
        },
    },
    "select_topk": {
        "plain": lambda s, t: {"scores": _scores(s, t), "k": s.k},
        "masked_smallest": lambda s, t: {"scores": _scores(s, t), "k": s.k, **_masked(s), "largest": False},
        "budgets": lambda s, t: {
            "scores": _scores(s, t), "k": s.k, "budgets": integers(-1, s.k + 3, s.batch, dtype=torch.int64, seed=47)
        },
    },
    "select_grouped_topk": {
        "plain": lambda s, t: {
            "scores": _scores(s, t), "k": s.k,
            "groups": integers(-1, s.listed + 1, s.batch, s.tokens, dtype=torch.int64, seed=43),
            "budgets": integers(-1, 3, s.batch, s.listed, dtype=torch.int64, seed=44),
        },
        "masked_smallest": lambda s, t: {
            "scores": _scores(s, t), "k": s.k, **_masked(s), "largest": False,
            "groups": integers(0, max(s.listed, 1), s.batch, s.tokens, dtype=torch.int64, seed=45),
            "budgets": integers(0, 9, s.batch, s.listed, dtype=torch.int64, seed=46),
        },
    },
    "select_two_tailed": {
        "plain": lambda s, t: {
            "scores": _scores(s, t), "num_low": integers(0, 5, s.batch, dtype=torch.int64, seed=34), "k": s.k
        },
        "masked_out_of_range": lambda s, t: {
            "scores": _scores(s, t), "num_low": integers(-1, 2, s.batch, dtype=torch.int64, seed=35) * 10**15, "k": s.k,
            **_masked(s),
        },
    },
    "select_mixture": {
        "plain": lambda s, t: {"text_scores": _scores(s, t, 0), "visual_scores": _scores(s, t, 0, 36), "k": s.k},
        "masked_no_floor": lambda s, t: {
            "text_scores": _scores(s, t), "visual_scores": _scores(s, t, 0, 36), "k": s.k, "floor": 0.0, **_masked(s)
        },
    },
    "mask_to_indices": {"plain": lambda s, t: {"mask": flags(s.batch, s.tokens, seed=37), "capacity": s.k}},
    "repulsion_sample": {
        "plain": lambda s, t: {"features": _outlying(s, t), "k": s.k},
        "isolated_masked": lambda s, t: {"features": _tokens(s, t), "k": s.k, "first": "isolated", **_masked(s)},
        "seeded_sum": lambda s, t: {
            "features": _one_hot(s, t), "k": s.k, "positions": _grid(s, t), "potential": "riesz", "aggregate": "sum",
            "seed_indices": index_list(s.tokens, s.batch, s.listed, seed=38), "position_weight": 0.0,
            "exponent": 2.0, "epsilon": 2.0,
        },
        "farthest": lambda s, t: {
            "features": _tokens(s, t), "positions": _grid(s, t), "k": s.k, "potential": "riesz", "first": "index"
        },
        "relevance": lambda s, t: {
            "features": _tokens(s, t), "k": s.k, "energy": integers(-4, 5, s.batch, s.tokens, dtype=t, seed=39),
            **_masked(s),
        },
        "gaussian": lambda s, t: {
            "features": _tokens(s, t), "positions": _grid(s, t), "k": s.k, "potential": "gaussian", "sigma": 2.0,
            "first": "isolated",
        },
    },
    "spatial_semantic_nms": {
        "plain": _nms,
        "hard_grouped": lambda s, t: {
            **_nms(s, t), **_masked(s), "groups": integers(0, 3, s.batch, s.tokens, dtype=torch.int64, seed=40),
            "mode": "hard",
        },
        "infinite": lambda s, t: {
            **_nms(s, t), "radius": 2.0, "sigma_spatial": float("inf"), "sigma_semantic": float("inf")
        },
    },
    "dpp_sample": {
        "plain": lambda s, t: {"features": _one_hot(s, t), "k": s.k},
        "quality_masked": lambda s, t: {
            "features": _one_hot(s, t), "k": s.k, "quality": integers(-2, 5, s.batch, s.tokens, dtype=t, seed=48),
            **_masked(s), "epsilon": 0.0,
        },
    },
    "coverage_sample": {
        "plain": lambda s, t: {"similarity": integers(-2, 9, s.batch, s.listed, s.tokens, dtype=t, seed=49), "k": s.k},
        "everything": lambda s, t: {
            "similarity": integers(-2, 9, s.batch, s.listed, s.tokens, dtype=t, seed=49), "k": s.k, **_masked(s),
            "row_weights": integers(-1, 4, s.batch, s.listed, dtype=t, seed=60),
            "quality": integers(-1, 4, s.batch, s.tokens, dtype=t, seed=61),
            "row_mask": flags(s.batch, s.listed, seed=62),
        },
    },
    "density_peaks": {
        "plain": lambda s, t: {"features": _tokens(s, t), "k": s.k},
        "masked": lambda s, t: {"features": _tokens(s, t), "k": s.k, "neighbors": 3, **_masked(s)},
        "one_neighbor": lambda s, t: {"features": _grid(s, t, s.channels), "k": s.k, "neighbors": 1},
    },
    "gather_compact": {"plain": _gather},
    "merge_tokens": {
        "plain": _merge,
        "everything": lambda s, t: {
            **_merge(s, t), **_masked(s), "keys": _tokens(s, t), "threshold": 0.25, "include_targets": False,
            "weights": integers(-1, 4, s.batch, s.tokens, dtype=t, seed=63),
        },
        "euclidean": lambda s, t: {
            **_merge(s, t), "keys": _grid(s, t, s.channels), "metric": "euclidean", "threshold": 9.0
        },
        "assigned": lambda s, t: {
            **_merge(s, t), "assignment": index_list(s.k, s.batch, s.tokens, seed=64),
        },
    },
}  # fmt: skip
