"""select_grouped_topk: every group of a sample is selected from by a program of its own, and one launch packs the list.

    groups -> the tokens of a group (segments.py) -> their keys -> the budgets[b, g] best (radix.py) -> marks
    marks  -> indices in ascending order, -1 behind them, counts (mask_kernel of selection_topk.py)

launch        grid           reads                                         writes
group_kernel  B * max(G, 1)  the groups twice; scores, mask of its tokens  8 bytes per token of workspace, 1 per mark
mask_kernel   B              the marks once                                8 (k + 1)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .order import is_better, order_key
from .radix import best_of, check_tokens, load_keys, select_config
from .runtime import batch_stride, check_not_float64, fresh, launch, mask_rows, rows, workspace
from .segments import write_segment
from .selection_topk import mask_kernel


@triton.jit
def group_kernel(
    scores_ptr, groups_ptr, budgets_ptr, mask_ptr, tokens_ptr, keys_ptr, marks_ptr,
    n, groups, programs, score_stride, group_stride, budget_stride, mask_stride,
    LARGEST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // programs).to(tl.int64)
    group = tl.program_id(0) % programs
    scores_ptr += sample * score_stride
    groups_ptr += sample * group_stride
    if mask_ptr is not None:
        mask_ptr += sample * mask_stride
    marks_ptr += sample * n
    if group == 0:  # tokens of no group have no program
        for first in range(0, n, BLOCK_N):
            token = first + tl.arange(0, BLOCK_N).to(tl.int64)
            own = tl.load(groups_ptr + token, mask=token < n, other=0)
            stray = (token < n) & ((own < 0) | (own >= groups))
            tl.store(marks_ptr + token, tl.zeros([BLOCK_N], tl.uint8), mask=stray)
    if group < groups:
        begin, length = write_segment(groups_ptr, group, n, tokens_ptr + sample * n, BLOCK_N)
        tokens_ptr += sample * n + begin
        keys_ptr += sample * n + begin
        tl.debug_barrier()  # tokens, and below their keys, are read by other threads than wrote them
        for first in range(0, length, BLOCK_N):
            place = first + tl.arange(0, BLOCK_N).to(tl.int64)
            valid = place < length
            token = tl.load(tokens_ptr + place, mask=valid, other=0)
            scores = tl.load(scores_ptr + token, mask=valid, other=0.0).to(tl.float32)
            if mask_ptr is not None:
                valid = valid & (tl.load(mask_ptr + token, mask=valid, other=0) != 0)
            key = order_key(scores, valid, LARGEST)
            tl.store(keys_ptr + place, key.to(tl.int32, bitcast=True), mask=place < length)
        tl.debug_barrier()
        budget = tl.maximum(tl.load(budgets_ptr + sample * budget_stride + group), 0)
        key, cut = best_of(None, keys_ptr, length, budget, tl.uint32, BLOCK_N)
        for first in range(0, length, BLOCK_N):
            place = first + tl.arange(0, BLOCK_N)
            inside = place < length
            chosen = is_better(load_keys(keys_ptr, first, length, BLOCK_N), place, key, cut)
            token = tl.load(tokens_ptr + place.to(tl.int64), mask=inside, other=0)
            tl.store(marks_ptr + token, chosen.to(tl.uint8), mask=inside)


def select_grouped_topk(
    scores: Tensor, groups: Tensor, budgets: Tensor, k: int, *, mask: Tensor | None = None, largest: bool = True
) -> tuple[Tensor, Tensor]:
    indices, counts = fresh(*_fakes.select_grouped_topk(scores, groups, budgets, k, mask=mask, largest=largest))
    check_not_float64("select_grouped_topk", scores=scores)
    check_tokens("select_grouped_topk", "scores", scores.shape[1])
    scores, groups, budgets, flags = rows(scores), rows(groups), rows(budgets), mask_rows(mask)
    batch, n = scores.shape
    count = budgets.shape[1]
    programs = count if count > 0 else 1
    tokens, keys = (workspace(scores, (batch, n), torch.int32) for _ in range(2))
    marks = workspace(scores, (batch, n), torch.uint8)
    config = select_config(n)
    launch(
        group_kernel, (batch * programs,), scores,
        scores, groups, budgets, flags, tokens, keys, marks, n, count, programs,
        scores.stride(0), groups.stride(0), budgets.stride(0), batch_stride(flags),
        config=config, LARGEST=largest,
    )  # fmt: skip
    launch(mask_kernel, (batch,), scores, marks, indices, counts, n, k, n, config=config)
    return indices, counts
