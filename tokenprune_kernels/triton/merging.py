"""merge_tokens: an argmax over tiles of likenesses that are never stored, and sums in ascending order of the tokens.

launch         grid                 reads                                             writes
assign_kernel  B * token blocks     a block's keys once per BLOCK_L targets, and all  assignment
                                    targets' keys
segment_kernel B * K                the assignment twice (segments.py)                the tokens of each target, 4 N
mean_kernel    B * K * channel      values once, of the tokens that joined            merged, sizes
               blocks

A sum starts at zero and takes one token after the other: neither the grid nor the number of targets changes its order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .distances import squared_distances
from .order import key_with_index, order_key
from .radix import check_tokens, select_config
from .runtime import (
    Config,
    batch_stride,
    cdiv,
    check_indices,
    check_not_float64,
    float32,
    fresh,
    launch,
    mask_rows,
    power_of_two,
    rows,
    workspace,
)
from .segments import write_segment
from .similarity import cosine_tile, similarity_config


def assign_config(dtype: torch.dtype, n: int, targets: int, channels: int, metric: str) -> Config:
    """Tiles as in cosine_scores. The best slots take registers beside them: in float32 half as many targets."""
    if metric == "cosine" and dtype == torch.float32:
        return Config({"BLOCK_N": 32, "BLOCK_L": 16, "BLOCK_C": 32}, num_warps=4, num_stages=2)
    if metric == "cosine":
        return similarity_config(dtype, n, targets, channels)
    return Config({"BLOCK_N": 16, "BLOCK_L": 8, "BLOCK_C": 32}, num_warps=4, num_stages=1)


def mean_config(channels: int) -> Config:
    block = power_of_two(channels, 64, 512)
    return Config({"BLOCK_D": block}, num_warps=1 if block <= 128 else 4)


@triton.jit
def key_value(key):
    """The float32 value behind order_key(value, True, True) of a number."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(
    keys_ptr, targets_ptr, mask_ptr, token, tokens, n, slots, channels, row_stride, threshold,
    COSINE: tl.constexpr, INCLUDE_TARGETS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The slot that each token of a block joins, or -1."""
    features_ptr = keys_ptr + tl.where(tokens, token, 0).to(tl.int64) * row_stride
    best = tl.zeros([BLOCK_N], tl.int64)
    own = tl.full([BLOCK_N], -1, tl.int32)
    for first in range(0, slots, BLOCK_L):
        slot = first + tl.arange(0, BLOCK_L)
        row = tl.load(targets_ptr + slot, mask=slot < slots, other=-1)
        listed = (row >= 0) & (row < n)
        listed_ptr = keys_ptr + tl.where(listed, row, 0) * row_stride
        if COSINE:
            likeness = cosine_tile(listed_ptr, listed, features_ptr, tokens, channels, BLOCK_L, BLOCK_N, BLOCK_C)
        else:
            squares = squared_distances(listed_ptr, listed, features_ptr, tokens, channels, BLOCK_L, BLOCK_N, BLOCK_C)
            likeness = -tl.sqrt_rn(squares)
        candidate = key_with_index(order_key(likeness, listed[:, None], True), slot[:, None])
        best = tl.maximum(best, tl.max(candidate, 0))
        itself = listed[:, None] & (row[:, None] == token[None, :])
        own = tl.maximum(own, tl.max(tl.where(itself, slot[:, None], -1), 0))
    key = best >> 31
    joins = key > 1  # 0: no target, 1: NaN with all of them
    if threshold is not None:
        joins = joins & (key_value(key.to(tl.uint32)) >= threshold)
    if mask_ptr is not None:
        joins = joins & (tl.load(mask_ptr + token, mask=tokens, other=0) != 0)
    joined = tl.where(joins, 0x7FFFFFFF - (best & 0x7FFFFFFF), -1)
    return tl.where(own >= 0, own.to(tl.int64) if INCLUDE_TARGETS else -1, joined)


@triton.jit
def assign_kernel(
    keys_ptr, targets_ptr, given_ptr, mask_ptr, assignment_ptr, n, slots, channels, blocks,
    sample_stride, row_stride, target_stride, given_stride, mask_stride, threshold,
    COSINE: tl.constexpr, INCLUDE_TARGETS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = token < n
    if given_ptr is not None:
        joined = tl.load(given_ptr + sample * given_stride + token, mask=tokens, other=-1)
        joined = tl.where((joined >= 0) & (joined < slots), joined, -1)
    else:
        if mask_ptr is not None:
            mask_ptr += sample * mask_stride
        joined = _nearest(
            keys_ptr + sample * sample_stride, targets_ptr + sample * target_stride, mask_ptr, token, tokens,
            n, slots, channels, row_stride, threshold, COSINE, INCLUDE_TARGETS, BLOCK_N, BLOCK_L, BLOCK_C,
        )  # fmt: skip
    tl.store(assignment_ptr + sample * n + token, joined.to(tl.int64), mask=tokens)


@triton.jit
def segment_kernel(assignment_ptr, order_ptr, bounds_ptr, n, slots, BLOCK_N: tl.constexpr):
    sample = (tl.program_id(0) // slots).to(tl.int64)
    slot = tl.program_id(0) % slots
    begin, length = write_segment(assignment_ptr + sample * n, slot, n, order_ptr + sample * n, BLOCK_N)
    bounds_ptr += 2 * (sample * slots + slot)
    tl.store(bounds_ptr, begin)
    tl.store(bounds_ptr + 1, begin + length)


@triton.jit
def mean_kernel(
    values_ptr, weights_ptr, order_ptr, bounds_ptr, merged_ptr, sizes_ptr,
    n, channels, slots, columns, sample_stride, row_stride, weight_stride, BLOCK_D: tl.constexpr,
):  # fmt: skip
    target = (tl.program_id(0) // columns).to(tl.int64)
    column = tl.program_id(0) % columns
    sample = target // slots
    channel = column * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < channels
    total = tl.zeros([BLOCK_D], tl.float32)
    size = 0.0
    for place in range(tl.load(bounds_ptr + 2 * target), tl.load(bounds_ptr + 2 * target + 1)):
        token = tl.load(order_ptr + sample * n + place).to(tl.int64)
        x = tl.load(values_ptr + sample * sample_stride + token * row_stride + channel, mask=inside, other=0.0)
        x = x.to(tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + sample * weight_stride + token).to(tl.float32)
            counts = weight > 0  # neither negative nor NaN
            size += tl.where(counts, weight, 0.0)
            total += tl.where(counts, weight * x, 0.0)
        else:
            size += 1.0
            total += x
    mean = tl.where(size > 0, tl.div_rn(total, tl.zeros([BLOCK_D], tl.float32) + size), 0.0)
    tl.store(merged_ptr + target * channels + channel, mean.to(merged_ptr.dtype.element_ty), mask=inside)
    if column == 0:
        tl.store(sizes_ptr + target, size)


def merge_tokens(
    values: Tensor,
    targets: Tensor,
    *,
    keys: Tensor | None = None,
    assignment: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: float | None = None,
    metric: str = "cosine",
    include_targets: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    merged, sizes, joined = fresh(
        *_fakes.merge_tokens(
            values, targets, keys=keys, assignment=assignment, weights=weights, mask=mask, threshold=threshold,
            metric=metric, include_targets=include_targets,
        )
    )  # fmt: skip
    check_not_float64("merge_tokens", values=values, keys=keys, weights=weights)
    batch, n, channels = values.shape
    slots = targets.shape[1]
    check_tokens("merge_tokens", "values", n)
    check_indices("merge_tokens", "targets", targets, n)
    if assignment is not None:
        check_indices("merge_tokens", "assignment", assignment, slots)
    values, compared, targets = rows(values), rows(values if keys is None else keys), rows(targets)
    given, flags, weights = rows(assignment), mask_rows(mask), rows(weights)
    least = None if threshold is None else float32(threshold if metric == "cosine" else -threshold)
    config = assign_config(compared.dtype, n, slots, compared.shape[2], metric)
    blocks = cdiv(n, config.blocks["BLOCK_N"])
    launch(
        assign_kernel, (batch * blocks,), values,
        compared, targets, given, flags, joined, n, slots, compared.shape[2], blocks, *compared.stride()[:2],
        targets.stride(0), batch_stride(given), batch_stride(flags), least,
        config=config, COSINE=metric == "cosine", INCLUDE_TARGETS=include_targets,
    )  # fmt: skip
    order = workspace(values, (batch, n), torch.int32)
    bounds = workspace(values, (batch, slots, 2), torch.int32)
    launch(
        segment_kernel, (batch * slots,), values, joined, order, bounds, n, slots, config=select_config(n)
    )  # fmt: skip
    config = mean_config(channels)
    columns = cdiv(channels, config.blocks["BLOCK_D"]) if channels > 0 else 1  # a column that has the sizes
    launch(
        mean_kernel, (batch * slots * columns,), values,
        values, weights, order, bounds, merged, sizes, n, channels, slots, columns, *values.stride()[:2],
        batch_stride(weights), config=config,
    )  # fmt: skip
    return merged, sizes, joined
