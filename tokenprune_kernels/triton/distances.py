"""Squared distances of two blocks of rows, from differences: equal rows have distance 0, and nothing cancels."""

import triton
import triton.language as tl


@triton.jit
def squared_distances(
    a_ptr, a_inside, b_ptr, b_inside, channels, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """[BLOCK_A, BLOCK_B] of rows at the pointers a_ptr and b_ptr; to the bit the same for (a, b) and (b, a).

    Differences are squared and added per channel of a block, and over the block at the end: no reduction between
    threads in the loop, and sums whose order does not depend on where in the tile a pair is.
    """
    squares = tl.zeros([BLOCK_A, BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        in_row = (channel < channels)[None, :]
        a = tl.load(a_ptr[:, None] + channel[None, :], mask=a_inside[:, None] & in_row, other=0.0).to(tl.float32)
        b = tl.load(b_ptr[:, None] + channel[None, :], mask=b_inside[:, None] & in_row, other=0.0).to(tl.float32)
        difference = a[:, None, :] - b[None, :, :]
        squares += difference * difference
    return tl.sum(squares, 2)
