"""Packed batches: sequences of any lengths one after another, cut as FlashAttention's varlen functions cut them.

Sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1 of a packed tensor [T, ...]; cu_seqlens is int32
[B + 1], begins with 0, and stays on the device. How many tokens there are at most is told by shapes and host integers,
so that the host waits for nothing and a call can be captured in a CUDA graph. Tokens behind the last sequence belong to
none.

`select_topk` and `gather_compact` pad nothing: a packed batch is one long sample whose sequences are the groups of
`tokenprune_kernels.select_grouped_topk`, and positions in it are positions in one sample. The attention functions call
the op for every sequence on the CPU, where the host sees where it begins. Elsewhere they copy query and key once into
[B, max_seqlen, ...], by one launch of `tokenprune_kernels.gather_compact` for either, and pack what comes back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from ._checks import check_count, fail
from ._packed import attend, check_beside, check_packed, cut, sequences

__all__ = ["attention_entropy", "attention_scores", "cross_attention_scores", "gather_compact", "select_topk"]


def select_topk(
    scores: Tensor,
    k: int,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    largest: bool = True,
    budgets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best tokens of each sequence, in ascending order, as `tokenprune_kernels.select_topk` chooses them.

    Args:
        scores: [T] of any floating dtype.
        k: how many a sequence keeps, >= 0; a shorter one keeps all.
        cu_seqlens: [B + 1] int32, where the sequences begin and the last one ends.
        mask: [T] bool, True for the tokens that may be selected; default all.
        largest: False selects the k smallest instead.
        budgets: [B] int64, how many each sequence keeps of at most k; they stay on the device. Negative counts as 0.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [P] int64, positions in the packed batch, ascending, -1 after the last; P = min(T, B k). And the
        cu_seqlens [B + 1] int32 of what is kept.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value. What `cu_seqlens` holds is
            looked at on the CPU only.

    >>> import torch, tokenprune_kernels as tp
    >>> scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.4])
    >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)  # tokens 0 to 2, and 3 and 4
    >>> tp.varlen.select_topk(scores, 1, cu_seqlens)
    (tensor([1, 4]), tensor([0, 1, 2], dtype=torch.int32))
    """
    op = "varlen.select_topk"
    check_packed(op, "scores", scores, "T")
    check_count(f"tokenprune::{op}", "k", k)
    c = cut(op, "cu_seqlens", cu_seqlens, scores)
    if mask is not None:
        check_beside(op, "mask", mask, torch.bool, c.tokens, scores)
    if budgets is not None:
        check_beside(op, "budgets", budgets, torch.int64, c.batch, scores)
    wanted = c.bounds.new_full((c.batch,), k) if budgets is None else budgets.clamp(0, k)
    indices, _ = ops.select_grouped_topk(
        scores[None], sequences(c)[None], wanted[None], min(c.tokens, c.batch * k),
        mask=None if mask is None else mask[None], largest=largest, backend=backend,
    )  # fmt: skip
    up_to = c.bounds  # how many tokens may be selected up to there
    if mask is not None:
        up_to = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[c.bounds.clamp(0, c.tokens)]
    kept = torch.minimum(wanted, up_to.diff()).cumsum(0)
    return indices[0], torch.nn.functional.pad(kept, (1, 0)).to(torch.int32)


def gather_compact(
    tensors: Sequence[Tensor], indices: Tensor, *, dims: int | Sequence[int] = 0, backend: str | None = None
) -> list[Tensor]:
    """Keep the selected tokens of packed tensors, in one launch: out[..., n, ...] = t[..., indices[n], ...].

    Args:
        tensors: packed tensors of any dtypes: hidden states [T, C], positions [3, T], keys and values [T, H, D].
        indices: [P] int64, positions in the packed batch, as `select_topk` returns them; -1 gives zeros.
        dims: for each tensor its token dimension; one integer holds for all.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        For each tensor a contiguous one with P in place of its token dimension, differentiable.

    Raises:
        ValueError, TypeError, IndexError: as in `tokenprune_kernels.gather_compact`.

    >>> import torch, tokenprune_kernels as tp
    >>> hidden = torch.arange(10.0).view(5, 2)
    >>> tp.varlen.gather_compact([hidden], torch.tensor([1, 4, -1]))[0]
    tensor([[2., 3.],
            [8., 9.],
            [0., 0.]])
    """
    op = "varlen.gather_compact"
    check_packed(op, "indices", indices, "P")
    if not isinstance(tensors, (list, tuple)):
        fail(TypeError, op, "tensors", "be a list of tensors", type(tensors).__name__)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            fail(TypeError, op, f"tensors[{i}]", "be a tensor", type(t).__name__)
    dims = [dims] * len(tensors) if isinstance(dims, int) else dims
    kept = ops.gather_compact(
        [t[None] for t in tensors], indices[None], dims=[d if d < 0 else d + 1 for d in dims], backend=backend
    )
    return [t[0] for t in kept]


def attention_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
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
    """Scores of the keys of every sequence from a known log-sum-exp, as flash_attn_varlen_func returns it.

    Args:
        lse: [Hq, Tq] of any floating dtype.
        query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query_mask, key_mask, query_positions,
            scale, causal, cosine, head_reduction, query_reduction, backend: as in `cross_attention_scores`.

    Returns:
        The scores alone, shaped as those of `cross_attention_scores`.

    Raises:
        ValueError, TypeError: as in `cross_attention_scores`.

    >>> import torch, tokenprune_kernels as tp
    >>> query, key, lse = torch.ones(2, 1, 4), torch.ones(3, 1, 4), torch.full((1, 2), 2.0)  # every logit is 2
    >>> rows, keys = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    >>> tp.varlen.attention_scores(query, key, lse, rows, keys, 1, 2)
    tensor([1., 1., 1.])
    """
    _check_reduced("varlen.attention_scores", query_reduction)
    (scores,) = attend(
        "attention_scores", query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
        key_mask=key_mask, query_positions=query_positions, query_mask=query_mask, lse=lse, backend=backend,
        scale=scale, cosine=cosine, head_reduction=head_reduction, query_reduction=query_reduction,
    )  # fmt: skip
    return scores


def attention_entropy(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy and log-sum-exp of every row over the visible keys of its sequence, both [Hq, Tq].

    Args:
        query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_mask, query_positions, scale, causal,
            cosine, backend: as in `cross_attention_scores`.

    Returns:
        entropy, lse: as those of `cross_attention_scores`.

    Raises:
        ValueError, TypeError: as in `cross_attention_scores`.

    >>> import torch, tokenprune_kernels as tp
    >>> query, key = torch.ones(2, 1, 4), torch.ones(3, 1, 4)
    >>> rows, keys = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    >>> tp.varlen.attention_entropy(query, key, rows, keys, 1, 2)[0]
    tensor([[0.6931, 0.0000]])
    """
    entropy, lse = attend(
        "attention_entropy", query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
        key_mask=key_mask, query_positions=query_positions, backend=backend, scale=scale, cosine=cosine,
    )  # fmt: skip
    return entropy, lse


def cross_attention_scores(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
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
    """Score every key by the attention that it receives from the rows of its sequence: (scores, entropy, lse).

    What `tokenprune_kernels.cross_attention_scores` gives of each sequence by itself.

    Args:
        query: [Tq, Hq, D], packed; Hq is a multiple of Hkv.
        key: [Tk, Hkv, D], packed.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, where the sequences begin and the last one ends.
        max_seqlen_q, max_seqlen_k: ints, the lengths of the longest sequences or more.
        query_mask: [Tq] bool, the rows that take part in the row reduction. All by default.
        key_mask: [Tk] bool, the visible keys. All by default.
        query_positions: [Tq] int64, with `causal` the last key of its sequence that each row sees, counted from 0;
            right-aligned by default, as in FlashAttention: row i of M rows sees N - M + i.
        scale, causal, cosine, head_reduction, query_reduction, backend: as in
            `tokenprune_kernels.cross_attention_scores`, without query_reduction="none".

    Returns:
        scores: [Tk], or [R, Tk] when R > 1 reductions are joined by "+"; with head_reduction="none" [Hq, Tk] or
            [R, Hq, Tk].
        entropy, lse: [Hq, Tq], as FlashAttention's.
        Tokens of no sequence get 0 in all of them.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value. What cu_seqlens hold is looked
            at on the CPU only; elsewhere no memory is read out of bounds, whatever they hold.

    >>> import torch, tokenprune_kernels as tp
    >>> query, key = torch.ones(2, 1, 4), torch.ones(3, 1, 4)
    >>> rows, keys = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    >>> tp.varlen.cross_attention_scores(query, key, rows, keys, 1, 2)[0]
    tensor([0.5000, 0.5000, 1.0000])
    """
    _check_reduced("varlen.cross_attention_scores", query_reduction)
    scores, entropy, lse = attend(
        "cross_attention_scores", query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
        key_mask=key_mask, query_positions=query_positions, query_mask=query_mask, backend=backend, scale=scale,
        cosine=cosine, head_reduction=head_reduction, query_reduction=query_reduction,
    )  # fmt: skip
    return scores, entropy, lse


def _check_reduced(op: str, query_reduction: str) -> None:
    if query_reduction == "none":
        fail(ValueError, op, "query_reduction", "reduce the rows, of which sequences have different numbers", "'none'")
