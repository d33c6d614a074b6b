"""Greedy selection: repulsion sampling and spatial-semantic non-maximum suppression."""

from torch import Tensor

from .. import _checks
from .._backend import implementation


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Repeatedly pick the token that the selected ones repel least: (indices in order of selection, counts)."""
    _checks.repulsion_sample(
        features, k, positions, seed_indices, energy, mask,
        potential, aggregate, feature_weight, position_weight, exponent, sigma, epsilon, first,
    )  # fmt: skip
    result: tuple[Tensor, Tensor] = implementation(backend, features).repulsion_sample(
        features,
        k,
        positions=positions,
        seed_indices=seed_indices,
        energy=energy,
        mask=mask,
        potential=potential,
        aggregate=aggregate,
        feature_weight=feature_weight,
        position_weight=position_weight,
        exponent=exponent,
        sigma=sigma,
        epsilon=epsilon,
        first=first,
    )
    return result


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdaptPrune's suppression of near and similar tokens: (indices in order of selection, selected_scores, counts)."""
    _checks.spatial_semantic_nms(
        scores, features, positions, k, groups, mask, radius, sigma_spatial, sigma_semantic, mode, threshold
    )
    result: tuple[Tensor, Tensor, Tensor] = implementation(backend, scores).spatial_semantic_nms(
        scores,
        features,
        positions,
        k,
        groups=groups,
        mask=mask,
        radius=radius,
        sigma_spatial=sigma_spatial,
        sigma_semantic=sigma_semantic,
        mode=mode,
        threshold=threshold,
    )
    return result
