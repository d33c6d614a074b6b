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
    """Repeatedly pick the token that the selected ones repel least.

    With r2(i, j) = feature_weight * 2 * (1 - cos(f_i, f_j)) + position_weight * ||p_i - p_j||^2 (the second term only
    with `positions`) and the potential phi(i, j)

    * `cosine`: cos(f_i, f_j),
    * `riesz`: 1 / (r2 ** (exponent / 2) + epsilon),
    * `gaussian`: exp(-r2 / (2 * sigma ** 2)),

    each step picks the available token with the smallest U(i): the `aggregate` (`max` or `sum`) of phi(i, j) over the
    selected j, plus energy(i). Equal U: the lower index; NaN after every number; tokens with a False mask never. The
    picks are exact up to rounding: nothing is drawn at random and nothing is approximated.

    Known methods are special cases: `cosine` + `max` is max-min diversity sampling (DivPrune, arXiv 2503.02175, with
    first="isolated"; ZSPAPrune, arXiv 2510.17197, with the core tokens as seeds), `riesz` + `max` farthest-point
    sampling, `riesz` + `sum` potential-energy minimisation (as in STS, arXiv 2606.03569), `cosine` + `max` with
    energy = -relevance / lambda maximal marginal relevance.

    Args:
        features: [B, N, C], float16, bfloat16, float32 or float64, C >= 1. A zero vector has cosine 0 with everything.
        k: how many to pick, >= 0; may exceed N.
        positions: [B, N, P], any floating dtype.
        seed_indices: [B, S] int64, tokens that count as selected from the start and are never returned; -1 means no
            entry, repetitions count once, a False mask does not matter.
        energy: [B, N], any floating dtype, added to U.
        mask: [B, N] bool, True for the tokens that may be picked; default all.
        potential: `cosine`, `riesz` or `gaussian`.
        aggregate: `max` or `sum`.
        feature_weight, position_weight: weights of the two terms of r2, >= 0.
        exponent: of `riesz`, > 0.
        sigma: of `gaussian`, > 0.
        epsilon: of `riesz`, >= 0; keeps the potential of identical tokens finite.
        first: the first pick when there is neither a seed nor `energy` (with `energy` it is the smallest energy).
            `outlier`: the smallest cosine with the sum of all valid unit vectors; `isolated`: the smallest of the
            largest cosines with another valid token; `index`: the lowest valid index.
        backend: `cuda`, `triton`, `cpu`, `reference` or `auto`; default: see `use_backend`.

    Returns:
        indices [B, k] int64 in order of selection, -1 after the last, and counts [B] int64, how many were picked:
        the smaller of k and the number of available tokens.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        IndexError: a seed index lies outside [-1, N) (CPU and reference).

    >>> import torch, tokenprune_kernels as tp
    >>> corners = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    >>> tp.repulsion_sample(corners, 3, first="index")  # 1 is too close to 0
    (tensor([[0, 3, 2]]), tensor([3]))
    >>> mask = torch.tensor([[True, True, False, True]])
    >>> tp.repulsion_sample(corners, 3, seed_indices=torch.tensor([[3, -1]]), mask=mask)
    (tensor([[ 0,  1, -1]]), tensor([2]))
    """
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
    """Pick the best tokens one by one; each pick weakens the tokens that are both near it and similar to it.

    AdaptPrune (arXiv 2503.08019). After pick m, every token j of the same group with d = ||p_j - p_m|| <= radius has
    w = exp(-d^2 / (2 sigma_spatial^2)) * exp(-(1 - cos(f_j, f_m))^2 / (2 sigma_semantic^2)); its score becomes
    s_j * (1 - w) in mode `"soft"`, and in mode `"hard"` it is dropped when w >= threshold.

    Args:
        scores: what a token is worth at the start, [B, N], any floating dtype.
        features: [B, N, C], any floating dtype; what cosines are taken of (AdaptPrune: keys before the rotation).
        positions: [B, N, 2], any floating dtype; usually row and column on the patch grid.
        k: number of tokens to select.
        groups: [B, N] int64, the crop or frame of each token; tokens of different groups never interact. One group by
            default.
        mask: [B, N] bool, True where a token may be selected; all of them by default.
        radius: how far suppression reaches; infinite is legal.
        sigma_spatial, sigma_semantic: widths of the two factors; with an infinite one that factor is 1.
        mode: `"soft"` or `"hard"`.
        threshold: used by mode `"hard"` only.
        backend: `"cpu"`, `"cuda"`, `"triton"`, `"reference"` or `"auto"`; see `use_backend`.

    Returns:
        indices: [B, k] int64 in order of selection, -1 when no candidate is left.
        selected_scores: [B, k], each token's score at the moment it was selected, 0 in the padding: float32, or float64
            for float64 scores. The arithmetic is float64 when any of the three inputs is.
        counts: [B] int64, the number of valid entries.

        The best score wins, equal scores by lower index, NaN after every number. Nothing carries a gradient.

    Raises:
        ValueError: a shape, device or option value that does not fit.
        TypeError: a dtype that does not fit.

    >>> import torch, tokenprune_kernels as tp
    >>> scores = torch.tensor([[1.0, 0.9, 0.1]])
    >>> features = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [4.0, -3.0]]])
    >>> positions = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
    >>> tp.spatial_semantic_nms(scores, features, positions, 2, sigma_spatial=float("inf"))
    (tensor([[0, 2]]), tensor([[1.0000, 0.1000]]), tensor([2]))
    """
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
