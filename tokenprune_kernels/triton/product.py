"""Products of tiles that stay accurate however long the vectors are, and the norm that cosines divide by.

Matrix units add products into an accumulator by aligning all of them to the largest and cutting off what lies below
its last bit: each step errs towards zero by up to a unit in the last place, and over the 8192 channels of a long
vector that is a drift. So no accumulator takes more than MOST_PRODUCTS products: a piece of the vectors starts at zero,
and its sum is added to the total by the ordinary units, which round to nearest.
"""

import triton
import triton.language as tl

MOST_PRODUCTS = tl.constexpr(128)
NORM_FLOOR = tl.constexpr(1e-12)  # a zero vector has cosine 0 with everything


@triton.jit
def add_product(a, b, total):
    """total + a @ b in float32; a @ b has an accumulator of its own."""
    tl.static_assert(a.shape[1] <= MOST_PRODUCTS)
    # An fma with 1 and not a sum: Triton makes the other operand of a sum the accumulator of the product again.
    return tl.fma(tl.dot(a, b, input_precision="ieee"), tl.full(total.shape, 1.0, tl.float32), total)


@triton.jit
def norm_of_squares(squares):
    """max(||x||, NORM_FLOOR) from the sum of the squares of x."""
    norm = tl.sqrt_rn(squares)
    return tl.where(norm < NORM_FLOOR, NORM_FLOOR, norm)  # the comparison lets NaN through
