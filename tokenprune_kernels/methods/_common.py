"""What the methods share: the result type, the attention of visual tokens, their padding, and raster order."""

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._masks import indices_to_mask
from .._op import Budget
from ..ops import attention_entropy, attention_scores, cross_attention_scores, gather_compact, mask_to_indices

Grid = tuple[int, int] | Tensor


class Selection(NamedTuple):
    """The kept visual tokens of a batch.

    indices: [B, K] int64, ascending, -1 padding at the end. Positions among the V visual tokens (0 to V - 1), not in
        the prompt: with `key_indices`, the position in the prompt is `key_indices[b, indices[b, n]]`.
    counts: [B] int64, the number of valid entries, min(K, visual tokens of the sample).
    details: the intermediate quantities of the method by name, on the device of the inputs.

    A method that merges what it drops gives three more, which are None otherwise:

    merged: [B, K, C] in the dtype of `features`, without gradient: the rows that the sequence goes on with. Whoever
        compacts it puts `merged[b, n]` where `features[b, indices[b, n]]` would be: in the embeddings in front of the
        language model, in the hidden states in front of a decoder layer. All else, positions and caches, stays that of
        token `indices[b, n]`. A token that nothing joined has its own row; 0 in padding.
    sizes: [B, K] float32 (float64 for float64 features), how many tokens each row stands for, itself among them; 0 in
        padding.
    assignment: [B, V] int64, the slot n in [0, K) of the row that a token became part of, its own for a kept token; -1
        for one that is lost or padding. With it `merge_tokens` averages other tensors over the same tokens.
    """

    indices: Tensor
    counts: Tensor
    details: dict[str, Tensor]
    merged: Tensor | None = None
    sizes: Tensor | None = None
    assignment: Tensor | None = None


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


def row_attention(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    *,
    key_indices: Tensor | None,
    key_mask: Tensor | None,
    query_positions: Tensor | None,
    scale: float | None,
    causal: bool,
    backend: str | None,
) -> Tensor:
    """[B, M, V]: `visual_attention` of every row on its own, with a float32 value for every head on the way.

    The ops reduce rows but can leave heads apart: each row of a head is a head of one row. What its softmax sees is in
    its lse, so that only the columns behind its own position are left to hide.
    """
    if lse is None:
        _, lse = attention_entropy(
            query, key, key_mask=key_mask, query_positions=query_positions, scale=scale, causal=causal, backend=backend
        )
    batch, heads, count, dim = query.shape
    of_heads = attention_scores(
        query.reshape(batch, heads * count, 1, dim), key, lse.reshape(batch, heads * count, 1), key_indices=key_indices,
        key_mask=key_mask, scale=scale, head_reduction="none", backend=backend,
    )  # fmt: skip
    rows = of_heads.view(batch, heads, count, -1).mean(1)
    if not causal:
        return rows
    keys = key.shape[2]
    if query_positions is None:
        query_positions = torch.arange(keys - count, keys, device=key.device).unsqueeze(0)
    columns = torch.arange(keys, device=key.device).unsqueeze(0) if key_indices is None else key_indices
    return torch.where(columns.unsqueeze(1) <= query_positions.unsqueeze(2), rows, 0.0)


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


def number_range(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least and the largest finite value of each sample's real tokens, both [B, 1]; inf and -inf without any."""
    number = values.isfinite() if mask is None else mask & values.isfinite()
    low, high = (
        # A column more, because there is no minimum of nothing.
        torch.nn.functional.pad(torch.where(number, sign * values, torch.inf), (0, 1), value=torch.inf)
        for sign in (1, -1)
    )
    return low.amin(1, keepdim=True), -high.amin(1, keepdim=True)


def merge_into(
    features: Tensor,
    indices: Tensor,
    targets: Tensor,
    rows: Tensor,
    sizes: Tensor,
    assignment: Tensor,
    backend: str | None,
) -> dict[str, Tensor]:
    """`merged`, `sizes` and `assignment` of a `Selection` that keeps `indices` [B, K], some of them targets of a merge.

    targets [B, T] are tokens among the kept ones, -1: no entry; rows [B, T, C] is what becomes of them, and sizes
    [B, T] how many tokens each stands for; assignment [B, V] is the t that a token joined, -1: none.
    """
    k = indices.shape[1]
    kept = indices_to_mask(indices, assignment.shape[1])
    slot = torch.where(kept, kept.cumsum(1), 0)  # from 1 on, because gather_compact gives 0 where there is no entry
    (of_target,) = gather_compact([slot], targets, dims=[1], backend=backend)
    (joined,) = gather_compact([of_target], assignment, dims=[1], backend=backend)
    (own,) = gather_compact([features], indices, dims=[1], backend=backend)
    at = torch.where(of_target > 0, of_target - 1, k)  # a slot more takes what has no entry
    alone = torch.nn.functional.pad((indices >= 0).to(sizes.dtype), (0, 1))
    own = torch.nn.functional.pad(own, (0, 0, 0, 1))
    return {
        "merged": own.scatter(1, at.unsqueeze(-1).expand_as(rows), rows)[:, :k],
        "sizes": alone.scatter(1, at, sizes)[:, :k],
        "assignment": torch.where(joined > 0, joined, slot) - 1,
    }


def check_count(method: str, k: Budget, name: str = "k") -> int:
    return _checks.check_count(method, name, k)


def check_ratio(method: str, name: str, value: Any) -> None:
    """A share of a budget lies in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{method}: {name} must be a number in [0, 1], got {type(value).__name__}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{method}: {name} must lie in [0, 1], got {value}")


def check_visual(method: str, name: str, t: Tensor, batch: int, tokens: int) -> None:
    """A tensor over the visual tokens has the shape [B, V, ...]."""
    if t.dim() < 2 or t.shape[0] != batch or t.shape[1] != tokens:
        raise ValueError(
            f"{method}: {name} must have shape [B, V, ...] = [{batch}, {tokens}, ...] (one entry per visual token), "
            f"got {list(t.shape)}"
        )


def coordinates_of(method: str, positions: Tensor, sizes: torch.Size, dtype: torch.dtype) -> Tensor:
    """Positions [B, V, P], of any number type, in this dtype; [V, P] are those of every sample. sizes: B, V, ..."""
    if positions.dim() == 2:
        positions = positions.expand(sizes[0], *positions.shape)
    check_visual(method, "positions", positions, sizes[0], sizes[1])
    return positions.to(dtype)


def grid_sides(method: str, grid: Grid, batch: int, tokens: int) -> tuple[int | Tensor, int | Tensor]:
    """Height and width of the grid: (h, w), or [B, 2] or [B, V, 2] as tensors that broadcast over [B, V]."""
    if not isinstance(grid, Tensor):
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise TypeError(f"{method}: grid must be (height, width) or a tensor, got {grid!r}")
        if grid[0] < 0 or grid[1] < 0:
            raise ValueError(f"{method}: grid must be non-negative, got {grid!r}")
        return grid
    if grid.shape not in ((batch, 2), (batch, tokens, 2)):
        expected = f"[B, 2] or [B, V, 2], B = {batch} and V = {tokens}"
        raise ValueError(f"{method}: grid must have shape {expected}, got {list(grid.shape)}")
    height, width = (grid if grid.dim() == 3 else grid.unsqueeze(1)).unbind(-1)
    return height, width
