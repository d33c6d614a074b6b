"""AdaptPrune (arXiv 2503.08019): attention weighted towards the centre, thinned where tokens are near and alike."""

import torch
from torch import Tensor

from .._op import Budget
from ..ops import spatial_semantic_nms
from ..ops._attention import heads_first
from ._calls import called_like_ops
from ._common import Grid, Selection, ascending, check_count, coordinates_of, grid_sides, visual_attention, visual_mask
from ._method import Method, Stage


@called_like_ops
def adaptprune(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    positions: Tensor,
    k: Budget,
    *,
    grid: Grid,
    groups: Tensor | None = None,
    key_indices: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    scale: float | None = None,
    radius: float = 5.0,
    sigma_spatial: float = 1.5,
    sigma_semantic: float = 0.05,
    layout: str = "bhld",
    backend: str | None = None,
) -> Selection:
    """AdaptPrune (arXiv 2503.08019), as in the authors' code for LLaVA-1.5; inside the language model.

    1. a(j): attention from the last prompt token to visual token j, mean over heads (layer 1, before layer 2).
    2. Distribution correction: s(j) = a(j) * g(j) with a centred Gaussian over the h x w grid,
       g = exp(-(y^2 + x^2) / 2) / its maximum, y = linspace(-h/2, h/2, h)[row] / (h/2), x likewise.
    3. K times: pick m = argmax s; then for every j of the same crop with d = ||p_j - p_m|| <= radius
       w = exp(-d^2 / (2 sigma_spatial^2)) * exp(-(1 - cos(f_j, f_m))^2 / (2 sigma_semantic^2)),  s(j) <- s(j) (1 - w).

    query [B, Hq, M, D] needs only the last row (the last with query_mask [B, M] counts), key [B, Hkv, N, D] are all
    keys of the prompt, key_indices [B, V] the indices of the visual tokens (-1: padding, never selected; default: every
    key is visual), key_mask [B, N] marks keys that are not padding. features [B, V, C]: in the authors' code k_proj of
    the hidden states entering layer 2, all heads concatenated, before RoPE and without the layer's norm. positions
    [B, V, 2]: (row, column) within the crop, any number type. grid: (h, w) of a crop, [B, 2] when samples differ,
    or [B, V, 2] when the crops of a sample do.
    groups [B, V] int64: crop or frame of a token. The returned indices are positions among the V visual tokens.

    Where it comes from. All of it from the authors' code at 24 x 24 (sigma of the prior 12 = 24 / 2, radius 5, sigmas
    1.5 and 0.05). Ours: other grids scale only the prior; with several crops, prior and suppression act within a crop
    and one budget is shared by comparing scores; a picked token is struck off instead of relying on its score becoming
    0; ties go to the lower index. Budgets there are floors of a float product: int(576 * 0.1) = 57; beware
    int(576 * 0.222) = 127.

    details: attention and corrected [B, V], order [B, K] (order of selection), selected_scores [B, K].

    >>> import torch
    >>> from tokenprune_kernels.methods import adaptprune
    >>> attention = torch.tensor([3.0, 2.9, 2.0, 1.0])  # logits; tokens 0 and 1 are neighbours and alike
    >>> features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> positions = torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]])
    >>> kept = adaptprune(torch.ones(1, 1, 1, 1), attention.view(1, 1, 4, 1), features, positions, 2, grid=(2, 2))
    >>> kept.indices
    tensor([[0, 2]])
    """
    k = check_count("adaptprune", k)
    query, key = heads_first("adaptprune", layout, query=query, key=key)
    attention = visual_attention(
        query, key, lse, key_indices=key_indices, query_mask=query_mask, key_mask=key_mask,
        query_positions=query_positions, scale=scale, causal=causal, query_reduction="last", backend=backend,
    )  # fmt: skip
    positions = coordinates_of("adaptprune", positions, attention.shape, attention.dtype)

    corrected = attention * _centre_prior(positions, grid)
    order, selected_scores, _ = spatial_semantic_nms(
        corrected, features, positions, k, groups=groups, mask=visual_mask(key_indices, key_mask, backend),
        radius=radius, sigma_spatial=sigma_spatial, sigma_semantic=sigma_semantic, backend=backend,
    )  # fmt: skip
    indices, counts = ascending(order, attention.shape[1], k, backend)
    details = {"attention": attention, "corrected": corrected, "order": order, "selected_scores": selected_scores}
    return Selection(indices, counts, details)


def _centre_prior(positions: Tensor, grid: Grid) -> Tensor:
    """g(row, column), 1 at the cell nearest to the centre."""
    height, width = grid_sides("adaptprune", grid, *positions.shape[:2])
    return torch.exp((_offset(positions[..., 0], height) + _offset(positions[..., 1], width)) * -0.5)


def _offset(coordinate: Tensor, size: int | Tensor) -> Tensor:
    """(linspace(-size/2, size/2, size)[coordinate] / (size/2))^2, minus the smallest such value on the axis."""
    last = size - 1
    span = last.clamp_min(1) if isinstance(last, Tensor) else max(last, 1)
    middle = last // 2
    return (coordinate * (2 / span) - 1) ** 2 - (middle * (2 / span) - 1) ** 2


ADAPTPRUNE = Method(
    "adaptprune",
    # The authors compare keys before RoPE, projected from hidden states that the layer has not normalised.
    (Stage(adaptprune, "layer", needs={"features": "unrotated_key"}),),
    title="AdaptPrune",
    summary="attention, weakened near kept look-alikes",
    paper="2503.08019",
    source="the authors' code for LLaVA-1.5",
)
