"""Attention scores of keys, with the entropy and log-sum-exp of every query row."""

from torch import Tensor

from .. import _checks
from .._backend import implementation, is_reference


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
            computed in one pass. Without any row in `query_mask` the scores are 0.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; see `use_backend`.

    Returns:
        scores: [B, V], or [B, R, V] when R > 1 reductions are joined by "+"; with head_reduction="none" [B, Hq, V] or
            [B, R, Hq, V]. V is N without `key_indices`.
        entropy: [B, Hq, M], -sum P log P of every row in nats; 0 for a row that sees nothing.
        lse: [B, Hq, M], the log-sum-exp of every row; -inf for a row that sees nothing.
        All are float32 (float64 for float64 inputs) and carry no gradient.

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
    """
    _checks.attention(
        "cross_attention_scores",
        query, key, None, key_indices, query_mask, key_mask, query_positions, head_reduction, query_reduction,
    )  # fmt: skip
    ops = implementation(backend, query)
    scores, entropy, lse = ops.cross_attention_scores(
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
    if not is_reference(ops) and "+" not in query_reduction:
        scores = scores.squeeze(1)  # the op returns [B, R, ...]; the reference has dropped R = 1 already
    return scores, entropy, lse


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
    backend: str | None = None,
) -> Tensor:
    """Scores from a log-sum-exp that is already known, for instance from the FlashAttention call that ran.

    P = exp(s - lse) on visible keys, then reduced like `cross_attention_scores`, whose arguments these are. `lse` may
    cover keys that are not in `key`: to score the image of a longer prompt, pass the image keys alone.

    Args:
        query: [B, Hq, M, D] float16, bfloat16, float32 or float64.
        key: [B, Hkv, N, D], the dtype of `query`.
        lse: [B, Hq, M] of any floating dtype, natural logarithm. A row with lse = -inf has P = 0.
        key_indices, query_mask, key_mask, query_positions, scale, causal, cosine, head_reduction, query_reduction,
            backend: as in `cross_attention_scores`.

    Returns:
        The scores alone, shaped as those of `cross_attention_scores`.

    Raises:
        TypeError, ValueError, IndexError: as in `cross_attention_scores`.

    Used where a method prunes inside the language model (COAST, STS stage 2, FastV, AdaptPrune): the attention of that
    layer has run already and most attention kernels return their log-sum-exp.

    Example:
        >>> import math, torch, tokenprune_kernels as tp
        >>> query, image = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 2, 4)
        >>> lse = torch.full((1, 1, 1), 2 + math.log(4))  # two more keys of the same logit 2 lie outside the image
        >>> tp.attention_scores(query, image, lse)
        tensor([[0.2500, 0.2500]])
    """
    if lse is None:
        raise TypeError("tokenprune::attention_scores: lse must be a tensor, got None")
    _checks.attention(
        "attention_scores",
        query, key, lse, key_indices, query_mask, key_mask, query_positions, head_reduction, query_reduction,
    )  # fmt: skip
    ops = implementation(backend, query)
    scores: Tensor = ops.attention_scores(
        query,
        key,
        lse,
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
    return scores.squeeze(1) if not is_reference(ops) and "+" not in query_reduction else scores


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy and log-sum-exp of every query row over its visible keys: (entropy, lse), both [B, Hq, M].

    The first half of `cross_attention_scores`, for callers that need no column scores: how concentrated each head's
    attention is (a low entropy marks heads that look at few tokens), or an lse for `attention_scores`.

    Args:
        query: [B, Hq, M, D] float16, bfloat16, float32 or float64.
        key: [B, Hkv, N, D], the dtype of `query`.
        key_mask, query_positions, scale, causal, cosine, backend: as in `cross_attention_scores`.

    Returns:
        entropy (nats) and lse, float32 (float64 for float64 inputs), without gradient. A row that sees nothing has
        entropy 0 and lse -inf.

    Raises:
        TypeError: an argument has the wrong dtype or is no tensor.
        ValueError: a wrong shape or device.

    Example:
        >>> import torch, tokenprune_kernels as tp
        >>> entropy, lse = tp.attention_entropy(torch.zeros(1, 2, 1, 8), torch.ones(1, 1, 4, 8))
        >>> entropy  # uniform over four keys: log 4
        tensor([[[1.3863],
                 [1.3863]]])
    """
    _checks.attention("attention_entropy", query, key, None, None, None, key_mask, query_positions, "mean", "mean")
    result: tuple[Tensor, Tensor] = implementation(backend, query).attention_entropy(
        query,
        key,
        key_mask=key_mask,
        query_positions=query_positions,
        scale=scale,
        causal=causal,
        cosine=cosine,
    )
    return result
