"""Cosines for the greedy ops: all inner products of a sample while they are few, one token's row of them otherwise.

Up to GRAM_TOKENS tokens `gram` writes the inner products of all pairs and the inverse norms in one launch, and a step
of a greedy op reads one row. Inner products are stored as they are and become cosines where they are read, so that the
norms (the diagonal) cost no launch of their own. Above that `inverse_norms` and `row_dots` serve a launch per step.

A product of two tokens adds its terms in an order that does not depend on where in the tile they are: tokens with equal
bits have equal cosines with every other, and tie.

launch                grid                          reads                          writes
gram_kernel           B * tiles on the triangle     2 * BLOCK rows of features     BLOCK^2 inner products, twice;
                                                                                   on the diagonal inverse norms
inverse_norms_kernel  B * token blocks              BLOCK_T rows                   BLOCK_T inverse norms
"""

import triton
import triton.language as tl
from torch import Tensor

from .product import add_product, norm_of_squares
from .runtime import Config, Target, cdiv, launch, power_of_two, target, workspace

GRAM_TOKENS = 3072  # up to here the inner products of all pairs are stored,
GRAM_BYTES = 256 << 20  # for as many samples at a time as fit into so much memory (and at least one)


def stores_gram(n: int) -> bool:
    return n <= GRAM_TOKENS


def gram_pitch(n: int) -> int:
    """Floats between two rows of inner products: rows start at multiples of 64 bytes."""
    return cdiv(n, 16) * 16


def samples_at_once(n: int) -> int:
    """Samples whose inner products exist at the same time."""
    per_sample = max(4 * n * gram_pitch(n), 4)
    return GRAM_BYTES // per_sample if per_sample <= GRAM_BYTES else 1


def gram_config(where: Target, itemsize: int, tiles: int) -> Config:
    """Tiles of 128 x 128 read the features half as often, but only many of them (`tiles`) occupy the GPU.

    On AMD GPUs the transposed copy of such a tile would take all of the shared memory; for float32, which has no matrix
    instructions on NVIDIA GPUs, it would not fit into registers. Nor would, but on sm_90, more than 32 channels at a
    time: the addresses of their loads are in registers beside a piece's sums and the totals.
    """
    if itemsize > 2:
        return Config({"BLOCK": 64, "BLOCK_C": 16}, num_warps=8, num_stages=2)
    if tiles >= 256 and where.backend != "hip":
        if where.arch == 90:
            return Config({"BLOCK": 128, "BLOCK_C": 64}, num_warps=8, num_stages=3)
        return Config({"BLOCK": 128, "BLOCK_C": 32}, num_warps=8, num_stages=4)
    return Config({"BLOCK": 64, "BLOCK_C": 64}, num_warps=4, num_stages=3 if where.backend == "cuda" else 2)


def large_tiles(batch: int, n: int) -> int:
    """Tiles of 128 x 128 on and above the diagonals."""
    side = cdiv(n, 128)
    return batch * side * (side + 1) // 2


def row_config(where: Target, itemsize: int, channels: int) -> Config:
    """Blocks of tokens for which one program computes a row's cosines; few tokens each, so that many programs work."""
    return Config({"BLOCK_T": 16, "BLOCK_C": power_of_two(channels, 32, 512 // itemsize)}, num_warps=4, num_stages=1)


@triton.jit
def inverse_norm(squares, infinite):
    """1 / max(||x||, NORM_FLOOR). 0 for a vector too large for its squares, NaN if its unit vector contains NaN."""
    return tl.div_rn(1.0, tl.where(infinite, float("nan"), norm_of_squares(squares)))


@triton.jit
def cosine_of(dot, inverse_i, inverse_j):
    """The cosine from an inner product, to the bit the same for (i, j) and (j, i)."""
    scale = inverse_i * inverse_j
    return tl.where(scale == 0, 0.0, dot * scale)  # an inner product with a vector too large may be infinite


@triton.jit
def _token_inverse_norms(
    features_ptr, token, inside, squares, channels, row_stride, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """`inverse_norm` of some tokens; only where squares overflow it reads the features, to look for infinite ones."""
    infinite = tl.zeros([BLOCK_T], tl.int32)
    if tl.max((squares == float("inf")).to(tl.int32), 0) > 0:
        for start in range(0, channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            x = tl.load(
                features_ptr + token[:, None] * row_stride + channel[None, :],
                mask=inside[:, None] & (channel < channels)[None, :],
                other=0.0,
            ).to(tl.float32)
            infinite = tl.maximum(infinite, tl.max((tl.abs(x) == float("inf")).to(tl.int32), 1))
    return inverse_norm(squares, infinite > 0)


@triton.jit
def gram_kernel(
    features_ptr, dots_ptr, inverse_ptr, n, channels, batch_stride, row_stride, pitch, side,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Rows p and side - 1 - p of the triangle on and above the diagonal have side + 1 tiles together.
    per_sample = ((side + 1) // 2) * (side + 1)
    sample = (tl.program_id(0) // per_sample).to(tl.int64)
    folded = tl.program_id(0) % per_sample
    upper, at = folded // (side + 1), folded % (side + 1)
    in_upper = at < side - upper
    row = tl.where(in_upper, upper, side - 1 - upper)
    column = tl.where(in_upper, upper + at, at - 1)
    if (row == upper) & (at >= side - upper):
        return  # the middle row of an odd number is folded onto itself
    features_ptr += sample * batch_stride
    dots_ptr += sample * n * pitch
    i = row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = column.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_inside, j_inside = i < n, j < n
    dots = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = channel < channels
        a = tl.load(
            features_ptr + i[:, None] * row_stride + channel[None, :],
            mask=i_inside[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            features_ptr + j[None, :] * row_stride + channel[:, None],
            mask=j_inside[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        dots = add_product(a, b, dots)
    both = i_inside[:, None] & j_inside[None, :]
    tl.store(dots_ptr + i[:, None] * pitch + j[None, :], dots, mask=both)
    if row == column:
        squares = tl.sum(tl.where(i[:, None] == j[None, :], dots, 0.0), 1)
        inverse = _token_inverse_norms(features_ptr, i, i_inside, squares, channels, row_stride, BLOCK, BLOCK_C)
        tl.store(inverse_ptr + sample * n + i, inverse, mask=i_inside)
    else:
        tl.store(dots_ptr + j[:, None] * pitch + i[None, :], tl.trans(dots), mask=tl.trans(both))


def gram(features: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products [B, N, pitch] and inverse norms [B, N] of features with contiguous rows."""
    batch, n, channels = features.shape
    pitch = gram_pitch(n)
    dots, inverse = workspace(features, (batch, n, pitch)), workspace(features, (batch, n))
    config = gram_config(target(features.device), features.element_size(), large_tiles(batch, n))
    side = cdiv(n, config.blocks["BLOCK"])
    launch(
        gram_kernel, (batch * ((side + 1) // 2) * (side + 1),), features,
        features, dots, inverse, n, channels, features.stride(0), features.stride(1), pitch, side,
        config=config,
    )  # fmt: skip
    return dots, inverse


# --- one token's row -------------------------------------------------------------------------------------------------


@triton.jit
def row_dots(
    features_ptr, token, inside, pick, channels, row_stride, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Inner products of a block of tokens with the token `pick`, whose index is in range."""
    dots = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        in_row = channel < channels
        x = tl.load(features_ptr + pick * row_stride + channel, mask=in_row, other=0.0).to(tl.float32)
        tile = tl.load(
            features_ptr + token[:, None] * row_stride + channel[None, :],
            mask=inside[:, None] & in_row[None, :],
            other=0.0,
        )
        dots += tile.to(tl.float32) * x[None, :]
    return tl.sum(dots, 1)


@triton.jit
def inverse_norms_kernel(
    features_ptr, inverse_ptr, n, channels, blocks, batch_stride, row_stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < n
    features_ptr += sample * batch_stride
    squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)  # in the order of `row_dots`
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        x = tl.load(
            features_ptr + token[:, None] * row_stride + channel[None, :],
            mask=inside[:, None] & (channel < channels)[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += x * x
    squares = tl.sum(squares, 1)
    inverse = _token_inverse_norms(features_ptr, token, inside, squares, channels, row_stride, BLOCK_T, BLOCK_C)
    tl.store(inverse_ptr + sample * n + token, inverse, mask=inside)


def inverse_norms(features: Tensor, config: Config) -> Tensor:
    batch, n, channels = features.shape
    inverse = workspace(features, (batch, n))
    blocks = cdiv(n, config.blocks["BLOCK_T"])
    launch(
        inverse_norms_kernel, (batch * blocks,), features,
        features, inverse, n, channels, blocks, features.stride(0), features.stride(1),
        config=config,
    )  # fmt: skip
    return inverse


# --- the best token of all blocks ------------------------------------------------------------------------------------


@triton.jit
def best_of_blocks(best_ptr, blocks, BLOCK_B: tl.constexpr):
    """The best of the candidates (order.key_with_index) that the blocks of a sample wrote in an earlier launch."""
    best = tl.zeros([BLOCK_B], tl.int64)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        best = tl.maximum(best, tl.load(best_ptr + block, mask=block < blocks, other=0))
    return tl.max(best, 0)


def best_block(blocks: int) -> int:
    """How many of the blocks' candidates `best_of_blocks` reads at a time."""
    return power_of_two(blocks, 128, 1024)
