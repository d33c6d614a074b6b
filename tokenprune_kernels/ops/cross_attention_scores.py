"""torch.ops.tokenprune.cross_attention_scores: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, op, scores
from ._attention import ATTENTION, BY_HEADS, BY_ROWS, HEADS, REDUCED, heads_first, reduced_shape


@op(
    **ATTENTION,
    **REDUCED,
    returns={"scores": scores(reduced_shape), "entropy": scores("B Hq M"), "lse": scores("B Hq M")},
    work=("key", "B * Hq * M * max(N, V) * D"),
    rule=HEADS,
    shardings=(*BY_HEADS, BY_ROWS),
    backends=KERNELS,
)
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
    layout: str = "bhld",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every key by the attention it receives: (scores, entropy, lse).

    With logits s(h, i, j) = scale * <q(h, i), k(h // group, j)>, group = Hq / Hkv, and P the softmax of s over the
    visible keys j, the heads h of P are reduced first and its rows i after that. The M x N matrix is never stored.

    Args:
        query: [B, Hq, M, D] float16, bfloat16, float32 or float64; Hq is a multiple of Hkv (grouped-query attention).
        key: [B, Hkv, N, D], the dtype of `query`.
        key_indices: [B, V] int64, the columns to return, in any order; -1 gives score 0. All N keys by default. The
            softmax runs over all visible keys in any case; to normalise over a subset, pass only that subset as `key`.
        query_mask: [B, M] bool, the rows that take part in the row reduction. All by default.
        key_mask: [B, N] bool, the visible keys. All by default.
        query_positions: [B, M] int64, with `causal` the last key that each row sees; N - M + i by default.
        scale: factor of the logits; D ** -0.5 by default, with `cosine` 1.
        causal: key j is visible to row i only when j <= query_positions[b, i].
        cosine: the logits are scale * cos(q, k); a zero vector has cosine 0.
        head_reduction: "mean", "sum", "max" or "none".
        query_reduction: "mean", "sum", "max", "last" (the last row of `query_mask`), or several joined by "+" and
            computed in one pass. Without any row in `query_mask` the scores are 0. Or "none", alone: every row keeps
            its scores, and those of rows outside `query_mask` are 0.
        layout: "blhd" when query and key are [B, M, Hq, D] and [B, N, Hkv, D], as FlashAttention has them; nothing is
            copied. All else is as with "bhld".
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        scores: [B, V], or [B, R, V] when R > 1 reductions are joined by "+"; with head_reduction="none" [B, Hq, V] or
            [B, R, Hq, V]. With query_reduction="none" [B, M, V], or [B, Hq, M, V] if head_reduction is "none" too.
            V is N without `key_indices`.
        entropy: [B, Hq, M], -sum P log P of every row in nats; 0 for a row that sees nothing.
        lse: [B, Hq, M], the log-sum-exp of every row; -inf for a row that sees nothing.
        All are float32 (float64 for float64 inputs) and carry no gradient.

    Warns:
        UserWarning: the key has more heads than tokens, and more than 128, or more than 16 that are no multiple of 4:
            no model has, and `layout="blhd"` is probably meant.

    Raises:
        TypeError: an argument has the wrong dtype or is no tensor.
        ValueError: a wrong shape, device or option.
        IndexError: a value of `key_indices` outside [-1, N) (GPU backends treat it as -1).

    Used by COAST (rows "max+last"), STS stage 2 (mean), AdaFV (`cosine`, scale=100, max over text rows), FastV and
    AdaptPrune (M = 1, the last prompt token), and for the CLS row of a vision tower.

    Example:
        Three equal keys, one of which the row cannot see:

        >>> import torch, tokenprune_kernels as tp
        >>> query, key = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 3, 4)
        >>> mask = torch.tensor([[True, False, True]])
        >>> scores, entropy, lse = tp.cross_attention_scores(query, key, key_mask=mask)
        >>> scores
        tensor([[0.5000, 0.0000, 0.5000]])
        >>> entropy, lse  # log 2, and 2 + log 2
        (tensor([[[0.6931]]]), tensor([[[2.6931]]]))

        The same from FlashAttention's layout:

        >>> rows, keys = query.transpose(1, 2), key.transpose(1, 2)  # [1, 1, 1, 4] and [1, 3, 1, 4]
        >>> tp.cross_attention_scores(rows, keys, key_mask=mask, layout="blhd")[0]
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    if layout != "bhld":
        query, key = heads_first("tokenprune::cross_attention_scores", layout, query=query, key=key)
    scores, entropy, lse = call(
        "cross_attention_scores",
        backend,
        query,
        key,
        key_indices=key_indices,
        query_mask=query_mask,
        key_mask=key_mask,
        query_positions=query_positions,
        scale=scale,
        causal=causal,
        cosine=cosine,
        head_reduction=head_reduction,
        query_reduction=query_reduction,
    )
    return scores if "+" in query_reduction else scores.squeeze(1), entropy, lse
