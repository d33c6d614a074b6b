"""torch.ops.tokenprune.spatial_semantic_nms: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import (
    KERNELS,
    Budget,
    Choice,
    Count,
    Number,
    coordinates,
    counts,
    flags,
    floats,
    integers,
    op,
    picks,
    scores,
)


@op(
    scores=floats("B N"),
    features=floats("B N C"),
    positions=coordinates("B N 2"),
    k=Count(),
    groups=integers("B N"),
    mask=flags("B N"),
    radius=Number(0.0),
    sigma_spatial=Number(0.0, above=True),
    sigma_semantic=Number(0.0, above=True),
    mode=Choice(("soft", "hard")),
    threshold=Number(float("-inf")),
    returns={"indices": picks("B k", ascending=False), "selected_scores": scores("B k"), "counts": counts("B")},
    work=("features", "B * min(k, N) * N * C"),
    backends=KERNELS,
)
def spatial_semantic_nms(
    scores: Tensor,
    features: Tensor,
    positions: Tensor,
    k: Budget,
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
        positions: [B, N, 2], or [N, 2] for all samples alike; any floating dtype, or integers, which become float32;
            usually row and column on the patch grid.
        k: number of tokens to select. Or as in `select_topk` a share of N, or a number for each sample.
        groups: [B, N] int64, the crop or frame of each token; tokens of different groups never interact. One group by
            default.
        mask: [B, N] bool, True where a token may be selected; all of them by default.
        radius: how far suppression reaches; infinite is legal.
        sigma_spatial, sigma_semantic: widths of the two factors; with an infinite one that factor is 1.
        mode: `"soft"` or `"hard"`.
        threshold: used by mode `"hard"` only.
        backend: which implementation serves the call; see `use_backend`.

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
    return call(
        "spatial_semantic_nms",
        backend,
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
