"""What the passes of the attention ops share: a tile of logits, who sees whom, the exponential, block sizes of D.

A tile of logits is scale * Q K^T for BLOCK_M query rows and BLOCK_N keys of one key head, accumulated in float32. A
vector is read in one or two pieces, BLOCK_D and BLOCK_TAIL elements (D = 72 costs 64 + 16), or, where it is long or
float32, in a run-time loop over pieces of BLOCK_D. With `cosine` the squares of both operands are summed from the
pieces that are there anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .product import MOST_PRODUCTS, add_product, norm_of_squares
from .runtime import Target, power_of_two

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)  # finite float32


# D of aligned 16-bit vectors at most -> pieces: powers of two, at least the 16 that a matrix instruction multiplies.
_PIECES = (
    (16, 16, 0), (32, 32, 0), (48, 32, 16), (64, 64, 0), (80, 64, 16), (96, 64, 32), (128, 128, 0), (144, 128, 16),
    (160, 128, 32), (192, 128, 64), (256, 128, 128),
)  # fmt: skip


def pieces(dtype: torch.dtype, dim: int, unit: int, longest: int) -> dict[str, int]:
    """How vectors of D elements are read: whole, in BLOCK_D and BLOCK_TAIL, or, STREAMED, in a loop over BLOCK_D."""
    if dtype != torch.float32 and unit > 1 and dim <= longest:
        for most, block, tail in _PIECES:
            if dim <= most:
                return {"BLOCK_D": block, "BLOCK_TAIL": tail, "STREAMED": False}
    if dtype != torch.float32 and unit > 1:
        return {"BLOCK_D": 64, "BLOCK_TAIL": 0, "STREAMED": True}
    # Without tensor cores for float32 every multiplication of a piece is an instruction of its own, and so is every
    # load of an element of unaligned vectors: short pieces.
    return {"BLOCK_D": 16 if dim <= 16 else 32, "BLOCK_TAIL": 0, "STREAMED": True}


def stages(target: Target, dtype: torch.dtype) -> int:
    """The stages of pipelined loads. AMD's pipeline needs one less; float32 would pay for a third in registers."""
    return 2 if target.backend == "hip" or dtype == torch.float32 else 3


def group_block(group: int) -> int:
    """How many query heads of a key head one tile of the column pass takes: tiles are padded to powers of two."""
    return power_of_two(group, 1, 64)


def strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of the first three dimensions; those of size 1 count as 0, so that they do not spoil the alignment."""
    a, b, c = (t.stride(d) if t.shape[d] > 1 else 0 for d in range(3))
    return a, b, c


def unit_of(query: Tensor, key: Tensor) -> int:
    """8 where D and all strides are multiples of 8 elements, else 1; kernels get them divided by it.

    Triton sees by itself only multiples of 16: with D = 72 it would load element by element.
    """
    aligned = query.shape[3] % 8 == 0 and all(s % 8 == 0 for s in (*strides(query), *strides(key)))
    return 8 if aligned else 1


@triton.jit
def load_piece(ptr, offsets, valid, start, dim, BLOCK: tl.constexpr):
    """Elements start .. start + BLOCK of the vectors at `offsets` as [vectors, BLOCK]; zeros where there is none."""
    d = start + tl.arange(0, BLOCK)
    return tl.load(ptr + offsets[:, None] + d[None, :], mask=valid[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def _squares(x):
    """Infinite when only the squares overflow, NaN for vectors with NaN or infinity."""
    x = x.to(tl.float32)
    return tl.sum(x * x + 0.0 * x, 1)


@triton.jit
def _scaled(dots, q_squares, k_squares, scale, COSINE: tl.constexpr):
    """Of cosines: where squares overflow, so may the dot product; of a finite one 0 is left, or the other's NaN."""
    if COSINE:
        of_q, of_k = 1.0 / norm_of_squares(q_squares), 1.0 / norm_of_squares(k_squares)
        dots = tl.minimum(tl.maximum(dots, -LARGEST), LARGEST)
        return dots * of_k[None, :] * (scale * of_q)[:, None]
    return dots * scale


@triton.jit
def piece_logits(q, q_tail, k, k_tail, scale, COSINE: tl.constexpr, BLOCK_TAIL: tl.constexpr):
    """[BLOCK_M, BLOCK_N] logits of vectors that are there as a whole."""
    dots = tl.dot(q, tl.trans(k), input_precision="ieee")
    if BLOCK_TAIL > 0:
        if q.shape[1] + BLOCK_TAIL <= MOST_PRODUCTS:
            dots = tl.dot(q_tail, tl.trans(k_tail), dots, input_precision="ieee")
        else:
            dots = add_product(q_tail, tl.trans(k_tail), dots)
    q_squares, k_squares = 0.0, 0.0
    if COSINE:
        q_squares, k_squares = _squares(q), _squares(k)
        if BLOCK_TAIL > 0:
            q_squares += _squares(q_tail)
            k_squares += _squares(k_tail)
    return _scaled(dots, q_squares, k_squares, scale, COSINE)


@triton.jit
def streamed_logits(
    q_ptr, q_offsets, q_valid, k_ptr, k_offsets, k_valid, dim, scale,
    COSINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] logits, both operands read piece by piece."""
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    q_squares = tl.zeros((BLOCK_M,), tl.float32)
    k_squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, dim, BLOCK_D):
        q = load_piece(q_ptr, q_offsets, q_valid, start, dim, BLOCK_D)
        k = load_piece(k_ptr, k_offsets, k_valid, start, dim, BLOCK_D)
        dots = add_product(q, tl.trans(k), dots)
        if COSINE:
            q_squares += _squares(q)
            k_squares += _squares(k)
    return _scaled(dots, q_squares, k_squares, scale, COSINE)


@triton.jit
def last_visible(positions_ptr, i, counts, m, n, CAUSAL: tl.constexpr):
    """The last key that each of the rows `i` may see, -1: none (and for rows that do not count), as int32."""
    if CAUSAL:
        last = tl.load(positions_ptr + i, mask=counts, other=-1) if positions_ptr is not None else n - m + i
        last = tl.minimum(tl.maximum(last, -1), n - 1).to(tl.int32)
    else:
        last = tl.zeros_like(i) + (n - 1)
    return tl.where(counts, last, -1)


@triton.jit
def exp_accurate(x):
    """exp(x) within two units in the last place for every x; below the normal range it is 0.

    exp2(x log2(e)) alone would multiply the rounding of a large product: an lse that is given lets x be anything.
    """
    t = x * LOG2E
    n = tl.floor(t)
    n = tl.where(n >= -126, n, -126.0)  # for NaN too: its conversion to an integer is undefined
    n = tl.where(n <= 127, n, 127.0)
    r = x - n * 0.693359375  # ln(2) in two parts; products with the first one, of 9 bits, are exact
    r += n * 2.12194440e-4
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^n
    y = tl.exp2(r * LOG2E) * power
    y = tl.where(t < -126, 0.0, y)
    return tl.where(t >= 128, float("inf"), y)


@triton.jit
def probability(logits, lse, j, last):
    """P = exp(s - lse) for the keys `j` that a row may see, up to `last`; 0 elsewhere and in rows whose lse is -inf."""
    hidden = (j[None, :] > last[:, None]) | (logits == float("-inf")) | (lse == float("-inf"))[:, None]
    return tl.where(hidden, 0.0, exp_accurate(logits - lse[:, None]))
