"""The row pass of the attention ops: lse and entropy of every query row over its visible keys.

The query heads that share a key head form one list of G M rows (G = Hq / Hkv); a program takes BLOCK_M of them and a
range of the keys, BLOCK_N at a time. A row's state is (m, sum of 2^t, sum of t 2^t), t = (s - m) log2(e), m the largest
logit so far. In the end lse = m + log(sum) and H = log(sum) - ln(2) weighted / sum: nothing cancels, because t is
measured from the maximum. A NaN among the visible logits makes sum, and with it lse and H, NaN.

attention_rows_kernel: grid B Hkv splits tiles, tile fastest, so that the programs that read the same keys run side by
  side. Reads Q and K, with `splits` = 1 writes lse and entropy, else 12 bytes per row and split.
attention_combine_kernel (splits > 1): grid B Hq M / BLOCK_R. Joins the states of a row, all splits at once.
"""

import torch
import triton
import triton.language as tl

from .attention_tile import LN2, LOG2E, last_visible, load_piece, piece_logits, pieces, stages, streamed_logits
from .runtime import Config, Target, power_of_two

MOST_SPLITS = 64
_PROGRAMS = 256  # about two per multiprocessor of a large GPU


def rows_config(target: Target, dtype: torch.dtype, dim: int, unit: int, rows: int) -> Config:
    """For `rows` query rows per key head."""
    vectors = pieces(dtype, dim, unit, longest=256)
    # 128 rows of 256 elements would take all registers of 8 warps, or all of the 64 KB of shared memory of gfx942.
    block_m = power_of_two(rows, 16, 64 if dim > 128 or vectors["STREAMED"] else 128)
    # float32 products are fused multiply-adds, with operands and sums in registers.
    block_n = 32 if dtype == torch.float32 else 64
    warps = 8 if block_m == 128 or (vectors["STREAMED"] and block_m == 64) else 4
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, **vectors}
    return Config(blocks, num_warps=warps, num_stages=stages(target, dtype))


def combine_config(splits: int) -> Config:
    """1024 states per program: 8 registers per thread and value."""
    return Config({"BLOCK_R": 1024 // splits, "SPLITS": splits})


def key_splits(programs: int, keys: int, block_n: int) -> int:
    """Ranges of keys for `programs` row tiles of a sample: enough for the whole GPU, whatever the batch is.

    Independent of the batch, so that a sample's bits are; a power of two by comparisons, for symbolic sizes.
    """
    splits = 1
    while splits < MOST_SPLITS and splits * programs < _PROGRAMS and 2 * splits * block_n <= keys:
        splits *= 2
    return splits


@triton.jit
def _reference(maximum):
    """What logits are measured from. With no visible logit every term is 0 then, with one of +inf the sum is +inf."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def _factor(t):
    """t as a factor of 2^t: finite where 2^t is 0. It may lose a NaN, which 2^t keeps."""
    return tl.maximum(t, -150.0)


@triton.jit
def _write(lse_ptr, entropy_ptr, row, valid, maximum, total, weighted):
    seen = total != 0
    log = tl.log(tl.where(seen, total, 1.0))
    tl.store(lse_ptr + row, tl.where(seen, _reference(maximum) + log, float("-inf")), mask=valid)
    tl.store(entropy_ptr + row, tl.where(seen, log - LN2 * (weighted / tl.where(seen, total, 1.0)), 0.0), mask=valid)


@triton.jit
def attention_rows_kernel(
    q_ptr, k_ptr, key_mask_ptr, positions_ptr, lse_ptr, entropy_ptr, partial_ptr,
    key_heads, group, m, n, dim, scale, splits,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    key_mask_stride, positions_stride,
    CAUSAL: tl.constexpr, COSINE: tl.constexpr, STREAMED: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(group * m, BLOCK_M)
    item = tl.program_id(0)
    tile = tiles - 1 - item % tiles  # causal rows at the end see most: they start first
    item //= tiles
    split = item % splits
    item //= splits
    key_head = (item % key_heads).to(tl.int64)
    sample = (item // key_heads).to(tl.int64)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < group * m
    head = key_head * group + row // m
    i = row % m
    if positions_ptr is not None:
        positions_ptr += sample * positions_stride
    if key_mask_ptr is not None:
        key_mask_ptr += sample * key_mask_stride
    last = last_visible(positions_ptr, i, valid, m, n, CAUSAL)

    dim *= UNIT
    q_ptr += sample * q_batch_stride * UNIT
    k_ptr += (sample * k_batch_stride + key_head * k_head_stride) * UNIT
    q_offsets = (head * q_head_stride + i.to(tl.int64) * q_row_stride) * UNIT
    if not STREAMED:
        q = load_piece(q_ptr, q_offsets, valid, 0, dim, BLOCK_D)
        q_tail = q
        if BLOCK_TAIL > 0:
            q_tail = load_piece(q_ptr, q_offsets, valid, BLOCK_D, dim, BLOCK_TAIL)

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    length = tl.cdiv(tl.cdiv(n, BLOCK_N), splits) * BLOCK_N
    end = tl.minimum((split + 1) * length, tl.max(last, 0) + 1)
    for start in range(split * length, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < n
        k_offsets = j.to(tl.int64) * k_row_stride * UNIT
        if STREAMED:
            logits = streamed_logits(
                q_ptr, q_offsets, valid, k_ptr, k_offsets, inside, dim, scale, COSINE, BLOCK_M, BLOCK_N, BLOCK_D
            )
        else:
            k = load_piece(k_ptr, k_offsets, inside, 0, dim, BLOCK_D)
            k_tail = k
            if BLOCK_TAIL > 0:
                k_tail = load_piece(k_ptr, k_offsets, inside, BLOCK_D, dim, BLOCK_TAIL)
            logits = piece_logits(q, q_tail, k, k_tail, scale, COSINE, BLOCK_TAIL)
        visible = j[None, :] <= last[:, None]
        if key_mask_ptr is not None:
            visible &= (tl.load(key_mask_ptr + j, mask=inside, other=0) != 0)[None, :]
        logits = tl.where(visible, logits, float("-inf"))

        raised = tl.maximum(maximum, tl.max(logits, 1))
        zero = _reference(raised)
        up = _factor((maximum - zero) * LOG2E)
        ratio = tl.exp2(up)
        t = (logits - zero[:, None]) * LOG2E
        e = tl.exp2(t)
        # The old state is measured from the new maximum: t grows by `up`, and every term by the factor 2^up.
        weighted = (weighted + total * up) * ratio + tl.sum(e * _factor(t), 1)
        total = total * ratio + tl.sum(e, 1)
        maximum = raised

    out = (sample * key_heads + key_head) * group * m + row
    if partial_ptr is not None:
        partial_ptr += out * (3 * splits) + split
        tl.store(partial_ptr, maximum, mask=valid)
        tl.store(partial_ptr + splits, total, mask=valid)
        tl.store(partial_ptr + 2 * splits, weighted, mask=valid)
    else:
        _write(lse_ptr, entropy_ptr, out, valid, maximum, total, weighted)


@triton.jit
def attention_combine_kernel(
    partial_ptr, lse_ptr, entropy_ptr, rows, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < rows
    inside = valid[:, None]
    at = partial_ptr + row[:, None] * (3 * SPLITS) + tl.arange(0, SPLITS)[None, :]
    maxima = tl.load(at, mask=inside, other=float("-inf"))
    totals = tl.load(at + SPLITS, mask=inside, other=0.0)
    weights = tl.load(at + 2 * SPLITS, mask=inside, other=0.0)
    maximum = tl.max(maxima, 1)
    up = _factor((maxima - _reference(maximum)[:, None]) * LOG2E)
    ratio = tl.exp2(up)
    weighted = tl.sum((weights + totals * up) * ratio, 1)
    total = tl.sum(totals * ratio, 1)
    _write(lse_ptr, entropy_ptr, row, valid, maximum, total, weighted)
