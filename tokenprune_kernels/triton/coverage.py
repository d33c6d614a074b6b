"""coverage_sample: gains of all tokens side by side, then one program per sample makes all picks, lazily.

Gains only fall, and so do their sums in float32: rounding is monotone and the order of the terms is fixed. The gain of
an earlier step is therefore a bound to the last bit, and the best of all bounds, when it is of this step, is the pick.
GROUP neighbouring tokens, which a read of memory brings anyway, are evaluated together.

launch           grid                   reads                                            writes
gains_kernel     B * ceil(N / GROUP)    similarity, row weights and mask, quality        a gain per token
coverage_kernel  B                      per evaluation GROUP columns and all gains, per  indices, gains, counts
                                        step a column
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .order import best_candidate, index_of
from .radix import check_tokens
from .runtime import (
    Config,
    batch_stride,
    cdiv,
    check_not_float64,
    fresh,
    launch,
    mask_rows,
    power_of_two,
    rows,
    workspace,
)

GROUP = tl.constexpr(16)  # 32 or 64 bytes of a row


def coverage_config(n: int, covered: int) -> Config:
    """The same rows at a time in both launches: the sums have to be those of one order."""
    blocks = {"BLOCK_R": power_of_two(covered, 16, 256), "BLOCK_N": power_of_two(n, 64, 4096)}
    return Config(blocks, num_warps=4 if n <= 1024 else 8)


@triton.jit
def _positive(x):
    """NaN and negative values count as 0."""
    return tl.where(x > 0, x.to(tl.float32), 0.0)


@triton.jit
def _gains(
    similarity_ptr, weights_ptr, row_mask_ptr, quality_ptr, covered_ptr, token, n, row_count, row_stride,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gains of GROUP tokens, given how well each row is covered (None: not at all)."""
    inside = token < n
    total = tl.zeros([BLOCK_R, GROUP], tl.float32)
    for first in range(0, row_count, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R).to(tl.int64)
        counts = row < row_count
        if row_mask_ptr is not None:
            counts = counts & (tl.load(row_mask_ptr + row, mask=counts, other=0) != 0)
        weight = tl.where(counts, 1.0, 0.0)
        if weights_ptr is not None:
            weight = _positive(tl.load(weights_ptr + row, mask=counts, other=0.0))
        value = _positive(
            tl.load(
                similarity_ptr + row[:, None] * row_stride + token[None, :],
                mask=counts[:, None] & inside[None, :], other=0.0,
            )
        )  # fmt: skip
        if covered_ptr is not None:
            value = tl.maximum(value - tl.load(covered_ptr + row, mask=counts, other=0.0)[:, None], 0.0)
        total += weight[:, None] * value
    gain = tl.sum(total, 0)
    if quality_ptr is not None:
        gain *= _positive(tl.load(quality_ptr + token, mask=inside, other=0.0))
    return gain


@triton.jit
def gains_kernel(
    similarity_ptr, weights_ptr, row_mask_ptr, quality_ptr, bound_ptr, n, row_count, groups,
    sample_stride, row_stride, weight_stride, row_mask_stride, quality_stride,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // groups).to(tl.int64)
    token = (tl.program_id(0) % groups).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    if weights_ptr is not None:
        weights_ptr += sample * weight_stride
    if row_mask_ptr is not None:
        row_mask_ptr += sample * row_mask_stride
    if quality_ptr is not None:
        quality_ptr += sample * quality_stride
    gain = _gains(
        similarity_ptr + sample * sample_stride, weights_ptr, row_mask_ptr, quality_ptr, None, token, n, row_count,
        row_stride, BLOCK_R,
    )  # fmt: skip
    tl.store(bound_ptr + sample * n + token, gain, mask=token < n)


@triton.jit
def _best(bound_ptr, free_ptr, n, BLOCK_N: tl.constexpr):
    best = tl.full([], 0, tl.int64)
    for first in range(0, n, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = token < n
        bound = tl.load(bound_ptr + token, mask=inside, other=0.0)
        free = tl.load(free_ptr + token, mask=inside, other=0) != 0
        best = tl.maximum(best, best_candidate(bound, free, token, True))
    return best


@triton.jit
def coverage_kernel(
    similarity_ptr, weights_ptr, row_mask_ptr, quality_ptr, mask_ptr, bound_ptr, known_ptr, free_ptr, covered_ptr,
    indices_ptr, gains_ptr, counts_ptr, n, row_count, groups, steps, k,
    sample_stride, row_stride, weight_stride, row_mask_stride, quality_stride, mask_stride,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    similarity_ptr += sample * sample_stride
    if weights_ptr is not None:
        weights_ptr += sample * weight_stride
    if row_mask_ptr is not None:
        row_mask_ptr += sample * row_mask_stride
    if quality_ptr is not None:
        quality_ptr += sample * quality_stride
    bound_ptr += sample * n
    free_ptr += sample * n
    known_ptr += sample * groups  # the step that a group's gains are of
    covered_ptr += sample * row_count
    indices_ptr += sample * k
    gains_ptr += sample * k
    for first in range(0, n, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N).to(tl.int64)
        free = token < n
        if mask_ptr is not None:
            free = free & (tl.load(mask_ptr + sample * mask_stride + token, mask=free, other=0) != 0)
        tl.store(free_ptr + token, free.to(tl.uint8), mask=token < n)
        tl.store(known_ptr + token, tl.zeros([BLOCK_N], tl.int32), mask=token < groups)
    for first in range(0, row_count, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R).to(tl.int64)
        tl.store(covered_ptr + row, tl.zeros([BLOCK_R], tl.float32), mask=row < row_count)
    count = tl.full([], 0, tl.int32)
    for step in range(steps):
        tl.debug_barrier()  # what was written is read by other threads
        best = _best(bound_ptr, free_ptr, n, BLOCK_N)
        group = tl.maximum(index_of(best), 0) // GROUP
        while (best > 0x7FFFFFFF) & (tl.load(known_ptr + group) < step):  # a bound; a best without a token is none
            token = group * GROUP + tl.arange(0, GROUP)
            gain = _gains(
                similarity_ptr, weights_ptr, row_mask_ptr, quality_ptr, covered_ptr, token, n, row_count, row_stride,
                BLOCK_R,
            )  # fmt: skip
            tl.debug_barrier()  # all threads have read bounds and steps before they change
            tl.store(bound_ptr + token, gain, mask=token < n)
            tl.store(known_ptr + group, step)
            tl.debug_barrier()
            best = _best(bound_ptr, free_ptr, n, BLOCK_N)
            group = tl.maximum(index_of(best), 0) // GROUP
        pick = index_of(best)
        picked = pick >= 0
        j = tl.maximum(pick, 0)
        tl.store(indices_ptr + step, pick)
        tl.store(gains_ptr + step, tl.where(picked, tl.load(bound_ptr + j), 0.0))
        count += picked.to(tl.int32)
        tl.debug_barrier()  # the scans above have read what is free
        tl.store(free_ptr + j, tl.full([], 0, tl.uint8))
        for first in range(0, row_count, BLOCK_R):
            row = first + tl.arange(0, BLOCK_R).to(tl.int64)
            inside = row < row_count
            value = _positive(tl.load(similarity_ptr + row * row_stride + j, mask=inside, other=0.0))
            covered = tl.load(covered_ptr + row, mask=inside, other=0.0)
            tl.debug_barrier()  # several threads may hold the same row
            tl.store(covered_ptr + row, tl.maximum(covered, value), mask=inside)
    for start in range(steps, k, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N).to(tl.int64)
        tl.store(indices_ptr + slot, tl.full([BLOCK_N], -1, tl.int64), mask=slot < k)
        tl.store(gains_ptr + slot, tl.zeros([BLOCK_N], tl.float32), mask=slot < k)
    tl.store(counts_ptr + sample, count.to(tl.int64))


def coverage_sample(
    similarity: Tensor,
    k: int,
    *,
    row_weights: Tensor | None = None,
    quality: Tensor | None = None,
    row_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    indices, gains, counts = fresh(
        *_fakes.coverage_sample(
            similarity, k, row_weights=row_weights, quality=quality, row_mask=row_mask, mask=mask
        )
    )  # fmt: skip
    check_not_float64("coverage_sample", similarity=similarity, row_weights=row_weights, quality=quality)
    batch, covered, n = similarity.shape
    check_tokens("coverage_sample", "similarity", n)
    similarity = rows(similarity)
    weights, own = rows(row_weights), rows(quality)
    row_flags, flags = mask_rows(row_mask), mask_rows(mask)
    groups = cdiv(n, GROUP.value)
    bound = workspace(similarity, (batch, n))
    config = coverage_config(n, covered)
    strides = (*similarity.stride()[:2], batch_stride(weights), batch_stride(row_flags), batch_stride(own))
    launch(
        gains_kernel, (batch * groups,), similarity,
        similarity, weights, row_flags, own, bound, n, covered, groups, *strides, config=config,
    )  # fmt: skip
    launch(
        coverage_kernel, (batch,), similarity,
        similarity, weights, row_flags, own, flags, bound, workspace(similarity, (batch, groups), torch.int32),
        workspace(similarity, (batch, n), torch.uint8), workspace(similarity, (batch, covered)),
        indices, gains, counts, n, covered, groups, min(k, n), k, *strides, batch_stride(flags), config=config,
    )  # fmt: skip
    return indices, gains, counts
