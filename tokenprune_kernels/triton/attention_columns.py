"""The column pass of the attention ops: scores of keys from the rows' log-sum-exp.

P(h, i, j) = exp(s(h, i, j) - lse(h, i)) where key j is visible to row i. Heads are reduced before rows, and a maximum
over rows of a mean over heads needs all heads of a (row, key) pair in one program: so it owns BLOCK_N columns, not
heads, and nothing of size rows x keys leaves the registers.

    for BLOCK_M / GROUP rows at a time:
        for every key head, and GROUP of its query heads at a time:     GROUP: Hq / Hkv, padded to a power of two
            tile of logits [BLOCK_M, BLOCK_N], row = (query row, head of the group);  P;  heads += or max= P
        sum, maximum, last row of the heads' result over these rows     all that are asked for, in registers
        or, with query_reduction="none" (EACH), the heads' result of every row is written

Rows that do not count (query_mask) or see none of the columns cost neither loads nor products. `last` alone computes
one block of rows, the same one as among other reductions, so that its bits are the same. With head_reduction="none" no
heads are combined: groups of heads are programs of their own. Every sum has a fixed order, the same for all columns.

attention_columns_kernel: grid B items parts ceil(V / BLOCK_N), columns fastest; items is 1, or with "none" the number
  of head groups. Reads Q once per column tile and K once per row block (from L2 after the first time), writes scores
  [B, R, H', V], or with parts > 1 (many rows) 4 to 12 bytes per part and column.
attention_parts_kernel (parts > 1): grid B ceil(H' V / BLOCK). Joins the row parts in order.
"""

import torch
import triton
import triton.language as tl

from .attention_tile import (
    group_block,
    last_visible,
    load_piece,
    piece_logits,
    pieces,
    probability,
    stages,
    streamed_logits,
)
from .runtime import Config, Target, power_of_two

REDUCTIONS = ("mean", "sum", "max", "last")
_MEAN, _SUM, _MAX, _LAST = (tl.constexpr(i) for i in range(4))
_ROWS_PER_PART = 256
MOST_PARTS = 16
PARTS_CONFIG = Config({"BLOCK": 128})


def columns_config(
    target: Target, dtype: torch.dtype, dim: int, unit: int, rows: int, group: int, columns: int
) -> Config:
    """For `rows` rows of `group` query heads each; the tile's rows hold whole groups of heads."""
    heads = group_block(group)
    if dtype == torch.float32:
        # Operands and sums of fused multiply-adds are in registers, and so would be a pipeline's: small tiles.
        block_m, block_n = power_of_two(rows * heads, max(16, heads), 32), 16
        depth = 1 if target.backend == "cuda" else 2
    else:
        block_m = power_of_two(rows * heads, max(16, heads), 64)
        # Narrow tiles, so that an image's few hundred columns occupy the GPU; wide ones where there are enough. With
        # operands in registers (mma.sync, AMD), unlike on sm_90 and sm_100, the widest would spill.
        spread = columns * row_parts(rows)
        widest = 64 if target.backend == "cuda" and target.arch in (90, 100, 103) else 32
        block_n = min(64 if spread > 4096 else 32 if spread > 1024 else 16, widest)
        depth = stages(target, dtype) if block_n < 64 else 2
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP": heads, **pieces(dtype, dim, unit, longest=128)}
    return Config(blocks, num_warps=8 if block_m * block_n >= 2048 else 4, num_stages=depth)


def row_parts(rows: int) -> int:
    """Programs that share the rows of a column tile: a function of the rows alone."""
    parts = 1
    while parts < MOST_PARTS and 2 * parts * _ROWS_PER_PART <= rows:
        parts *= 2
    return parts


def kinds_code(reductions: list[str]) -> int:
    """The row reductions in order, as digits of base 4."""
    return sum(REDUCTIONS.index(name) * 4**r for r, name in enumerate(reductions))


@triton.jit
def _ordered(p):
    """Non-negative floats as integers of the same order, NaN largest: a maximum that keeps NaN on every GPU."""
    return tl.where(p != p, 0x7FC00000, p.to(tl.int32, bitcast=True))


@triton.jit
def counted_rows(mask_ptr, m, BLOCK: tl.constexpr):
    """How many rows count, and the last of them, -1 where there is none."""
    count, last = m, m - 1
    if mask_ptr is not None:
        count, last = 0, -1
        for start in range(0, m, BLOCK):
            i = start + tl.arange(0, BLOCK)
            counts = tl.load(mask_ptr + i, mask=i < m, other=0) != 0
            count += tl.sum(counts.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(counts, i, -1), 0))
    return count, last


@triton.jit
def _heads_of_scores(head_group, chunks, group, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """The heads of the scores that a program writes, and which of them exist: with "none" those of its head group."""
    if HEADS == "none":
        g = head_group % chunks * GROUP + tl.arange(0, GROUP)
        heads, exist = head_group // chunks * group + g, g < group
    else:
        heads = tl.zeros((1,), tl.int32)
        exist = heads == 0
    return heads.to(tl.int64), exist


@triton.jit
def _write_rows(
    scores_ptr, values, start, m, v, sample, first, chunks, group, key_heads, column, inside,
    HEADS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the heads' results [ROWS, heads, columns] of the rows from `start` on, which are not reduced."""
    out_head, exist = _heads_of_scores(first, chunks, group, HEADS, GROUP)
    out_heads, over = 1, 1.0
    if HEADS == "none":
        out_heads = key_heads * group
    if HEADS == "mean":
        over = tl.maximum(key_heads * group, 1).to(tl.float32)
    i = start + tl.arange(0, ROWS)
    line = (sample * out_heads + out_head)[None, :] * m + i[:, None]
    at = line[:, :, None] * v + column[None, None, :]
    mask = (i < m)[:, None, None] & exist[None, :, None] & inside[None, None, :]
    tl.store(scores_ptr + at, values / over, mask=mask)


@triton.jit
def _write_scores(
    scores_ptr, at, stride, inside, total, best, final, heads, count,
    HEADS: tl.constexpr, KINDS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The R scores of columns from the sum, the (ordered) maximum and the last of their rows."""
    over = 1.0
    if HEADS == "mean":
        over = tl.maximum(heads, 1).to(tl.float32)
    rows = tl.maximum(count, 1).to(tl.float32)
    for r in tl.static_range(R):
        if (KINDS // 4**r) % 4 == _MEAN:
            value = total / over / rows
        elif (KINDS // 4**r) % 4 == _SUM:
            value = total / over
        elif (KINDS // 4**r) % 4 == _MAX:
            value = best.to(tl.float32, bitcast=True) / over
        else:
            value = final / over
        tl.store(scores_ptr + at + r * stride, value, mask=inside)


@triton.jit
def attention_columns_kernel(
    q_ptr, k_ptr, lse_ptr, indices_ptr, query_mask_ptr, key_mask_ptr, positions_ptr, scores_ptr, partial_ptr,
    key_heads, group, m, n, v, dim, scale, parts,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    lse_batch_stride, lse_head_stride, lse_row_stride,
    indices_stride, query_mask_stride, key_mask_stride, positions_stride,
    HEADS: tl.constexpr, KINDS: tl.constexpr, R: tl.constexpr,
    SUM: tl.constexpr, MAX: tl.constexpr, LAST: tl.constexpr, EACH: tl.constexpr,
    CAUSAL: tl.constexpr, COSINE: tl.constexpr, STREAMED: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // GROUP
    OUT: tl.constexpr = GROUP if HEADS == "none" else 1
    tiles = tl.cdiv(v, BLOCK_N)
    item = tl.program_id(0)
    tile = item % tiles
    item //= tiles
    part = item % parts
    item //= parts
    chunks = tl.cdiv(group, GROUP)
    first, end_item, items = 0, key_heads * chunks, 1
    if HEADS == "none":
        items = key_heads * chunks
        first = item % items
        end_item = first + 1
    sample = (item // items).to(tl.int64)

    dim *= UNIT
    q_ptr += sample * q_batch_stride * UNIT
    k_ptr += sample * k_batch_stride * UNIT
    lse_ptr += sample * lse_batch_stride
    if query_mask_ptr is not None:
        query_mask_ptr += sample * query_mask_stride
    if positions_ptr is not None:
        positions_ptr += sample * positions_stride

    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < v
    if indices_ptr is not None:
        j = tl.load(indices_ptr + sample * indices_stride + column, mask=inside, other=-1)
        shown = inside & (j >= 0) & (j < n)
        j = tl.where(shown, j, 0).to(tl.int32)
    else:
        j = column
        shown = inside & (j < n)
    if key_mask_ptr is not None:
        shown &= tl.load(key_mask_ptr + sample * key_mask_stride + j, mask=shown, other=0) != 0
    j = tl.where(shown, j, n)  # no row sees key n
    k_offsets = j.to(tl.int64) * k_row_stride * UNIT
    lowest = tl.min(j, 0)

    count, final_row = counted_rows(query_mask_ptr, m, 1024)
    if SUM or MAX or EACH:
        length = tl.cdiv(tl.cdiv(m, ROWS), parts) * ROWS
        begin, end = part * length, tl.minimum((part + 1) * length, m)
    else:
        begin, end = tl.maximum(final_row, 0) // ROWS * ROWS, final_row + 1

    t = tl.arange(0, BLOCK_M)
    total = tl.zeros((OUT, BLOCK_N), tl.float32)
    best = tl.zeros((OUT, BLOCK_N), tl.int32)
    final = tl.zeros((OUT, BLOCK_N), tl.float32)
    for start in range(begin, end, ROWS):
        i = start + t // GROUP
        counts = i < m
        if query_mask_ptr is not None:
            counts &= tl.load(query_mask_ptr + i, mask=counts, other=0) != 0
        last = last_visible(positions_ptr, i, counts, m, n, CAUSAL)
        if tl.max(last, 0) >= lowest:
            if HEADS == "max":
                heads = tl.zeros((ROWS, 1, BLOCK_N), tl.int32)
            else:
                heads = tl.zeros((ROWS, OUT, BLOCK_N), tl.float32)
            for head_group in range(first, end_item):
                key_head = (head_group // chunks).to(tl.int64)
                g = head_group % chunks * GROUP + t % GROUP
                used = counts & (g < group)
                head = key_head * group + g
                q_offsets = (head * q_head_stride + i.to(tl.int64) * q_row_stride) * UNIT
                lse_at = head * lse_head_stride + i.to(tl.int64) * lse_row_stride
                keys_ptr = k_ptr + key_head * k_head_stride * UNIT
                if STREAMED:
                    logits = streamed_logits(
                        q_ptr, q_offsets, used, keys_ptr, k_offsets, shown, dim, scale, COSINE,
                        BLOCK_M, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
                else:
                    q = load_piece(q_ptr, q_offsets, used, 0, dim, BLOCK_D)
                    k = load_piece(keys_ptr, k_offsets, shown, 0, dim, BLOCK_D)
                    q_tail, k_tail = q, k
                    if BLOCK_TAIL > 0:
                        q_tail = load_piece(q_ptr, q_offsets, used, BLOCK_D, dim, BLOCK_TAIL)
                        k_tail = load_piece(keys_ptr, k_offsets, shown, BLOCK_D, dim, BLOCK_TAIL)
                    logits = piece_logits(q, q_tail, k, k_tail, scale, COSINE, BLOCK_TAIL)
                lse = tl.load(lse_ptr + lse_at, mask=used, other=float("-inf")).to(tl.float32)  # -inf: P is 0
                # Masked here, visibility is no invariant of the loop that the compiler would keep in registers.
                seen = tl.where(used, last, -1)
                p = tl.reshape(probability(logits, lse, j, seen), (ROWS, GROUP, BLOCK_N))
                if HEADS == "none":
                    heads = p
                elif HEADS == "max":
                    heads = tl.maximum(heads, _ordered(p) if GROUP == 1 else tl.max(_ordered(p), 1, keep_dims=True))
                else:
                    heads += p if GROUP == 1 else tl.sum(p, 1, keep_dims=True)
            if HEADS == "max":
                heads = heads.to(tl.float32, bitcast=True)
            if SUM:
                total += tl.sum(heads, 0)
            if MAX:
                best = tl.maximum(best, tl.max(_ordered(heads), 0))
            if LAST:
                is_last = start + tl.arange(0, ROWS) == final_row
                final += tl.sum(tl.where(is_last[:, None, None], heads, 0.0), 0)
            if EACH:
                _write_rows(scores_ptr, heads, start, m, v, sample, first, chunks, group, key_heads, column, inside,
                            HEADS, ROWS, GROUP)  # fmt: skip
        elif EACH:
            nothing = tl.zeros((ROWS, OUT, BLOCK_N), tl.float32)
            _write_rows(scores_ptr, nothing, start, m, v, sample, first, chunks, group, key_heads, column, inside,
                        HEADS, ROWS, GROUP)  # fmt: skip

    out_heads = 1
    if HEADS == "none":
        out_heads = key_heads * group
    out_head, exist = _heads_of_scores(first, chunks, group, HEADS, GROUP)
    exists = exist[:, None] & inside[None, :]
    size = tl.cast(out_heads, tl.int64) * v
    at = out_head[:, None] * v + column[None, :]
    if EACH:
        pass
    elif partial_ptr is not None:
        at += (sample * parts + part) * 3 * size
        if SUM:
            tl.store(partial_ptr + at, total, mask=exists)
        if MAX:
            tl.store(partial_ptr + at + size, best.to(tl.float32, bitcast=True), mask=exists)
        if LAST:
            tl.store(partial_ptr + at + 2 * size, final, mask=exists)
    else:
        at += sample * R * size
        _write_scores(
            scores_ptr, at, size, exists, total, best, final, key_heads * group, count, HEADS, KINDS, R
        )  # fmt: skip


@triton.jit
def attention_parts_kernel(
    partial_ptr, query_mask_ptr, scores_ptr, heads, out_heads, m, v, parts, query_mask_stride,
    HEADS: tl.constexpr, KINDS: tl.constexpr, R: tl.constexpr,
    SUM: tl.constexpr, MAX: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    size = tl.cast(out_heads, tl.int64) * v
    blocks = tl.cdiv(size, BLOCK)
    item = tl.program_id(0)
    sample = item // blocks
    at = item % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if query_mask_ptr is not None:
        query_mask_ptr += sample * query_mask_stride
    count, _ = counted_rows(query_mask_ptr, m, 1024)
    total = tl.zeros((BLOCK,), tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    final = tl.zeros((BLOCK,), tl.float32)
    partial_ptr += sample * parts * 3 * size + at
    for part in range(parts):
        from_ptr = partial_ptr + part * 3 * size
        if SUM:
            total += tl.load(from_ptr, mask=inside, other=0.0)
        if MAX:
            best = tl.maximum(best, tl.load(from_ptr + size, mask=inside, other=0.0).to(tl.int32, bitcast=True))
        if LAST:
            final += tl.load(from_ptr + 2 * size, mask=inside, other=0.0)
    _write_scores(scores_ptr, sample * R * size + at, size, inside, total, best, final, heads, count, HEADS, KINDS, R)
