"""select_topk, select_two_tailed, mask_to_indices: one launch, one program per sample.

    scores, mask -> keys -> the k best (radix.best_of) -> indices in ascending order, -1 behind them, counts
    two tails:      keys -> the k - n best -> these get the top key, the others reversed ones -> the k best of that

Both tails are one selection in the end: what the high tail took comes first, then the lowest of what is left.

Grid B. A sample that fits one block (4096 tokens) is read once and stays in registers: bytes moved are scores, mask and
8 (k + 1). The keys of a longer one go to a workspace of 4 bytes per token, read once for each radix pass (at most 4,
twice that for two tails), for ties and for the list. mask_to_indices reads the mask once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .order import TOP_32, is_better, order_key, reversed_key
from .radix import LARGEST_BLOCK, best_of, check_tokens, load_keys, select_config, write_selection
from .runtime import batch_stride, check_not_float64, fresh, launch, mask_rows, rows, workspace


@triton.jit
def _score_keys(scores_ptr, mask_ptr, start, n, LARGEST: tl.constexpr, BLOCK_N: tl.constexpr):
    offset = start + tl.arange(0, BLOCK_N).to(tl.int64)
    valid = offset < n
    scores = tl.load(scores_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + offset, mask=valid, other=0) != 0)
    return order_key(scores, valid, LARGEST)


@triton.jit
def _without(keys, index, key, cut):
    """Keys for the low tail: the chosen on top of everything, the others in reverse; NaN and masked stay last."""
    return tl.where(is_better(keys, index, key, cut), TOP_32, reversed_key(keys)).to(tl.uint32)


@triton.jit
def select_kernel(
    scores_ptr, mask_ptr, num_low_ptr, budgets_ptr, keys_ptr, indices_ptr, counts_ptr,
    n, k, score_stride, mask_stride, num_low_stride, budget_stride, LARGEST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    scores_ptr += sample * score_stride
    if mask_ptr is not None:
        mask_ptr += sample * mask_stride
    if keys_ptr is None:
        keys = _score_keys(scores_ptr, mask_ptr, 0, n, LARGEST, BLOCK_N)
    else:
        keys = None
        keys_ptr += sample * n
        for start in range(0, n, BLOCK_N):
            offset = start + tl.arange(0, BLOCK_N).to(tl.int64)
            block = _score_keys(scores_ptr, mask_ptr, start, n, LARGEST, BLOCK_N)
            tl.store(keys_ptr + offset, block.to(tl.int32, bitcast=True), mask=offset < n)
        tl.debug_barrier()  # the keys are read by other threads than wrote them
    if num_low_ptr is not None:
        low = tl.load(num_low_ptr + sample * num_low_stride)
        low = tl.minimum(tl.maximum(low, 0), k)
        key, cut = best_of(keys, keys_ptr, n, k - low, tl.uint32, BLOCK_N)
        if keys_ptr is None:
            keys = _without(keys, tl.arange(0, BLOCK_N), key, cut)
        else:
            tl.debug_barrier()  # all threads have read the keys before they change
            for start in range(0, n, BLOCK_N):
                index = start + tl.arange(0, BLOCK_N)
                block = _without(load_keys(keys_ptr, start, n, BLOCK_N), index, key, cut)
                tl.store(keys_ptr + index.to(tl.int64), block.to(tl.int32, bitcast=True), mask=index < n)
            tl.debug_barrier()  # as above
    budget = k
    if budgets_ptr is not None:
        budget = tl.minimum(tl.maximum(tl.load(budgets_ptr + sample * budget_stride), 0), k)
    key, cut = best_of(keys, keys_ptr, n, budget, tl.uint32, BLOCK_N)
    write_selection(keys, keys_ptr, n, key, cut, indices_ptr + sample * k, counts_ptr + sample, k, BLOCK_N)


@triton.jit
def mask_kernel(mask_ptr, indices_ptr, counts_ptr, n, capacity, mask_stride, BLOCK_N: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    # The bytes of a mask are keys: True is above 0.
    write_selection(
        None, mask_ptr + sample * mask_stride, n, 0, 0, indices_ptr + sample * capacity, counts_ptr + sample,
        capacity, BLOCK_N,
    )  # fmt: skip


def _select(scores: Tensor, num_low: Tensor | None, budgets: Tensor | None, k: int, mask: Tensor | None, largest: bool,
            indices: Tensor, counts: Tensor) -> None:  # fmt: skip
    scores, mask = rows(scores), mask_rows(mask)
    batch, n = scores.shape
    keys = workspace(scores, (batch, n), torch.int32) if n > LARGEST_BLOCK else None
    launch(
        select_kernel, (batch,), scores,
        scores, mask, num_low, budgets, keys, indices, counts,
        n, k, *map(batch_stride, (scores, mask, num_low, budgets)),
        config=select_config(n), LARGEST=largest,
    )  # fmt: skip


def select_topk(
    scores: Tensor, k: int, *, mask: Tensor | None = None, largest: bool = True, budgets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    indices, counts = fresh(*_fakes.select_topk(scores, k, mask=mask, largest=largest, budgets=budgets))
    check_not_float64("select_topk", scores=scores)
    check_tokens("select_topk", "scores", scores.shape[1])
    _select(scores, None, budgets, k, mask, largest, indices, counts)
    return indices, counts


def select_two_tailed(scores: Tensor, num_low: Tensor, k: int, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    indices, counts = fresh(*_fakes.select_two_tailed(scores, num_low, k, mask=mask))
    check_not_float64("select_two_tailed", scores=scores)
    check_tokens("select_two_tailed", "scores", scores.shape[1])
    _select(scores, num_low, None, k, mask, True, indices, counts)
    return indices, counts


def mask_to_indices(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    indices, counts = fresh(*_fakes.mask_to_indices(mask, capacity))
    check_tokens("mask_to_indices", "mask", mask.shape[1])
    marks = mask_rows(mask)
    assert marks is not None
    batch, n = marks.shape
    launch(
        mask_kernel, (batch,), mask,
        marks, indices, counts, n, capacity, marks.stride(0),
        config=select_config(n),
    )  # fmt: skip
    return indices, counts
