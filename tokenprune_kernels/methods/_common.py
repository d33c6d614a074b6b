"""What the methods share: the result type, the attention of visual tokens, their padding, and raster order."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._masks import indices_to_mask
from ..ops import attention_scores, cross_attention_scores, gather_compact, mask_to_indices

Grid = tuple[int, int] | Tensor


class Selection(NamedTuple):
    """The kept visual tokens of a batch.

    indices: [B, K] int64, ascending, -1 padding at the end. Positions among the V visual tokens (0 to V - 1), not in
        the prompt: with `key_indices`, the position in the prompt is `key_indices[b, indices[b, n]]`.
    counts: [B] int64, the number of valid entries, min(K, visual tokens of the sample).
    details: the intermediate quantities of the method by name, on the device of the inputs.
    """

    indices: Tensor
    counts: Tensor
    details: dict[str, Tensor]


def visual_attention(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    *,
    key_indices: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_positions: Tensor | None,
    scale: float | None,
    causal: bool,
    query_reduction: str,
    backend: str | None,
) -> Tensor:
    """Mean over heads of the attention of each visual token, then `query_reduction` over the rows.

    The softmax runs over every visible key, as in the model; the visual columns are sliced, not renormalised.
    A known `lse` saves the pass that computes it.
    """
    if lse is None:
        return cross_attention_scores(
            query, key, key_indices=key_indices, query_mask=query_mask, key_mask=key_mask,
            query_positions=query_positions, scale=scale, causal=causal, query_reduction=query_reduction,
            backend=backend,
        )[0]  # fmt: skip
    return attention_scores(
        query, key, lse, key_indices=key_indices, query_mask=query_mask, key_mask=key_mask,
        query_positions=query_positions, scale=scale, causal=causal, query_reduction=query_reduction, backend=backend,
    )  # fmt: skip


def visual_mask(key_indices: Tensor | None, key_mask: Tensor | None, backend: str | None) -> Tensor | None:
    """True [B, V] where a visual token is real: it has an index and its key is not masked. None: all are."""
    if key_indices is None:
        return key_mask
    if key_mask is None:
        return key_indices >= 0
    return gather_compact([key_mask], key_indices, dims=[1], backend=backend)[0]  # -1 gathers False


def ascending(indices: Tensor, size: int, k: int, backend: str | None) -> tuple[Tensor, Tensor]:
    """The entries of a -1 padded list over `size` tokens in raster order: (indices [B, k], counts)."""
    return mask_to_indices(indices_to_mask(indices, size), k, backend=backend)


def check_count(method: str, k: int) -> None:
    """A budget is a host integer and not negative."""
    if not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{method}: k must be an int, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"{method}: k must be non-negative, got {k}")


def check_ratio(method: str, name: str, value: float) -> None:
    """A share of a budget lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{method}: {name} must lie in [0, 1], got {value}")


def check_visual(method: str, name: str, t: Tensor, batch: int, tokens: int) -> None:
    """A tensor over the visual tokens has the shape [B, V, ...]."""
    if t.dim() < 2 or t.shape[0] != batch or t.shape[1] != tokens:
        raise ValueError(
            f"{method}: {name} must have shape [B, V, ...] = [{batch}, {tokens}, ...] (one entry per visual token), "
            f"got {list(t.shape)}"
        )


def grid_sides(method: str, grid: Grid, batch: int, tokens: int) -> tuple[int | Tensor, int | Tensor]:
    """Height and width of the grid: (h, w), or [B, 2] or [B, V, 2] as tensors that broadcast over [B, V]."""
    if not isinstance(grid, Tensor):
        return grid
    if grid.shape not in ((batch, 2), (batch, tokens, 2)):
        expected = f"[B, 2] or [B, V, 2], B = {batch} and V = {tokens}"
        raise ValueError(f"{method}: grid must have shape {expected}, got {list(grid.shape)}")
    height, width = (grid if grid.dim() == 3 else grid.unsqueeze(1)).unbind(-1)
    return height, width
