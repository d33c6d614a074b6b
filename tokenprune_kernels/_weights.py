"""Attention weights that a model has computed already, as scores."""

import torch
from torch import Tensor

from ._backend import checked
from ._op import describe, flags, floats, scores
from .ops import gather_compact
from .ops._attention import REDUCED
from .reference._common import widen
from .reference.attention import _reduce_heads, _reduce_rows


@torch.no_grad()
def reduce_attention(
    weights: Tensor,
    *,
    key_indices: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    head_reduction: str = "mean",
    query_reduction: str = "mean",
) -> Tensor:
    """The scores of `cross_attention_scores` from weights that a model returned (`output_attentions=True`).

    Plain PyTorch, for weights that are in memory anyway: not to make them is what the op is for.

    Args:
        weights: [B, Hq, M, N], float16, bfloat16, float32 or float64: of one layer, softmaxed.
        key_indices: [B, V] int64, the columns to return, -1 gives score 0; all N by default.
        query_mask: [B, M] bool, the rows that take part in the row reduction. All by default.
        key_mask: [B, N] bool; other keys have score 0, and nothing is normalised again. All by default.
        head_reduction, query_reduction: as in `cross_attention_scores`; heads come first.

    Returns:
        scores, shaped as those of `cross_attention_scores`; float32 (float64 for float64 weights), without gradient.

    Raises:
        TypeError, ValueError, IndexError: as in `cross_attention_scores`.

    >>> import torch, tokenprune_kernels as tp
    >>> weights = torch.tensor([[[[0.2, 0.8, 0.0], [0.1, 0.4, 0.5]]]])  # one head, two rows
    >>> tp.reduce_attention(weights, query_reduction="last")  # FastV's
    tensor([[0.1000, 0.4000, 0.5000]])
    >>> tp.reduce_attention(weights, key_indices=torch.tensor([[2, 1]]), query_reduction="max")
    tensor([[0.5000, 0.8000]])
    """
    values = (weights, key_indices, query_mask, key_mask, head_reduction, query_reduction)
    weights, key_indices, query_mask, key_mask, _, _ = checked(_DESCRIPTION, values)
    weights = widen(weights)
    if key_mask is not None:
        weights = torch.where(key_mask[:, None, None], weights, 0)
    by_head = _reduce_heads(weights, head_reduction)
    scores = torch.stack([_reduce_rows(by_head, query_mask, r) for r in query_reduction.split("+")], 1)
    if key_indices is not None:
        scores = gather_compact(scores, key_indices, dims=-1)
    if head_reduction != "none":
        scores = scores.squeeze(2)
    return scores if "+" in query_reduction else scores.squeeze(1)


# Of a function that is no op: its arguments are checked as theirs.
_DESCRIPTION = describe(
    reduce_attention, **REDUCED, weights=floats("B Hq M N"), key_mask=flags("B N"), returns=scores("B V")
)
