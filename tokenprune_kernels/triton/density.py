"""density_peaks: squared distances a panel of rows at a time, and two walks over every row.

A panel holds some rows' distances to all tokens of their sample, at most PANEL_BYTES: several samples where they are
short, a part of one where it is long. The second walk needs all means of the first, so that the distances of a sample
of more than one panel (4096 tokens) are computed twice. They are stored as order keys (order.py), the larger the
closer, 0 where there is no distance: masked tokens and NaN then need no code afterwards.

launch           grid                  reads                             writes
distance_kernel  tiles of the panel    2 * BLOCK rows of features        BLOCK^2 keys
neighbors_kernel rows of the panel     its keys up to 4 times            m_i
closest_kernel   rows of the panel     its keys once, all means          closest denser and widest distance, squared
peak_kernel      B * token blocks      these                             density, distance, log(distance) - m
select_kernel    see selection_topk.py
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .distances import squared_distances
from .order import order_key
from .radix import check_tokens, load_keys, select_config, threshold
from .runtime import Config, batch_stride, cdiv, check_not_float64, fresh, launch, mask_rows, rows, workspace
from .selection_topk import _select

PANEL_BYTES = 64 << 20


def distance_config() -> Config:
    return Config({"BLOCK": 16, "BLOCK_C": 32}, num_warps=8, num_stages=1)


@triton.jit
def square_of(key):
    """The squared distance behind a key that is not 0; infinity for 0."""
    return tl.where(key == 0, 0x7F800000, (key ^ 0xFFFFFFFF) & 0x7FFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def distance_kernel(
    features_ptr, mask_ptr, keys_ptr, n, channels, first_row, panel_rows, sample_stride, row_stride, mask_stride,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    across = (n + BLOCK - 1) // BLOCK
    tiles = (panel_rows + BLOCK - 1) // BLOCK * across
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    row = tile // across * BLOCK + tl.arange(0, BLOCK)
    i = first_row + row
    j = tile % across * BLOCK + tl.arange(0, BLOCK)
    i_inside, j_inside = (row < panel_rows) & (i < n), j < n
    features_ptr += sample * sample_stride
    squares = squared_distances(
        features_ptr + tl.where(i_inside, i, 0) * row_stride, i_inside,
        features_ptr + tl.where(j_inside, j, 0) * row_stride, j_inside, channels, BLOCK, BLOCK, BLOCK_C,
    )  # fmt: skip
    i_valid, j_valid = i_inside, j_inside
    if mask_ptr is not None:
        mask_ptr += sample * mask_stride
        i_valid = i_valid & (tl.load(mask_ptr + i, mask=i_inside, other=0) != 0)
        j_valid = j_valid & (tl.load(mask_ptr + j, mask=j_inside, other=0) != 0)
    pair = i_valid[:, None] & j_valid[None, :] & (squares == squares)
    at = keys_ptr + (sample * panel_rows + row)[:, None] * n + j[None, :]
    key = order_key(squares, pair, False)
    tl.store(at, key.to(tl.int32, bitcast=True), mask=i_inside[:, None] & j_inside[None, :])


@triton.jit
def neighbors_kernel(
    keys_ptr, means_ptr, n, channels, neighbors, first_row, panel_rows, BLOCK_N: tl.constexpr
):  # fmt: skip
    sample = (tl.program_id(0) // panel_rows).to(tl.int64)
    row = tl.program_id(0) % panel_rows
    keys_ptr += (sample * panel_rows + row) * n
    key, ties = threshold(None, keys_ptr, n, neighbors, tl.uint32, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    found = 0
    for first in range(0, n, BLOCK_N):
        keys = load_keys(keys_ptr, first, n, BLOCK_N)
        total += tl.where(keys > key, square_of(keys), 0.0)
        found += tl.sum((keys > key).to(tl.int32), 0)
    equal = tl.where(ties > 0, ties.to(tl.float32) * square_of(key), 0.0)  # not 0 times infinity
    count = ((found + ties) * tl.maximum(channels, 1)).to(tl.float32)
    tl.store(means_ptr + sample * n + first_row + row, tl.div_rn(tl.sum(total, 0) + equal, count))


@triton.jit
def closest_kernel(
    keys_ptr, means_ptr, closest_ptr, widest_ptr, n, first_row, panel_rows, BLOCK_N: tl.constexpr
):  # fmt: skip
    sample = (tl.program_id(0) // panel_rows).to(tl.int64)
    row = tl.program_id(0) % panel_rows
    i = first_row + row
    keys_ptr += (sample * panel_rows + row) * n
    means_ptr += sample * n
    own = tl.load(means_ptr + i)
    closest = tl.full([BLOCK_N], float("inf"), tl.float32)
    widest = tl.zeros([BLOCK_N], tl.float32)
    is_densest = tl.full([BLOCK_N], 1, tl.int32)
    for first in range(0, n, BLOCK_N):
        keys = load_keys(keys_ptr, first, n, BLOCK_N)
        j = first + tl.arange(0, BLOCK_N)
        mean = tl.load(means_ptr + j.to(tl.int64), mask=j < n, other=0.0)
        pair = keys != 0
        denser = pair & ((mean < own) | ((mean == own) & (j < i)))
        square = square_of(keys)
        closest = tl.minimum(closest, tl.where(denser, square, float("inf")))
        widest = tl.maximum(widest, tl.where(pair, square, 0.0))
        is_densest = tl.where(denser, 0, is_densest)
    # -1: the largest distance of the sample, which the last launch knows.
    nearest = tl.where(tl.min(is_densest, 0) > 0, -1.0, tl.min(closest, 0))
    tl.store(closest_ptr + sample * n + i, nearest)
    tl.store(widest_ptr + sample * n + i, tl.max(widest, 0))


@triton.jit
def peak_kernel(
    means_ptr, closest_ptr, widest_ptr, mask_ptr, density_ptr, distance_ptr, values_ptr, n, channels, blocks,
    mask_stride, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    widest = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, n, BLOCK_N):
        other = first + tl.arange(0, BLOCK_N).to(tl.int64)
        widest = tl.maximum(widest, tl.load(widest_ptr + sample * n + other, mask=other < n, other=0.0))
    inside = token < n
    valid = inside
    if mask_ptr is not None:
        valid = inside & (tl.load(mask_ptr + sample * mask_stride + token, mask=inside, other=0) != 0)
    mean = tl.load(means_ptr + sample * n + token, mask=inside, other=0.0)
    square = tl.load(closest_ptr + sample * n + token, mask=inside, other=0.0)
    square = tl.where(square < 0, tl.max(widest, 0), square)
    scale = tl.zeros([BLOCK_N], tl.float32) + tl.maximum(channels, 1).to(tl.float32)
    distance = tl.sqrt_rn(tl.div_rn(square, scale))
    at = sample * n + token
    tl.store(density_ptr + at, tl.where(valid, tl.exp(-mean), 0.0), mask=inside)
    tl.store(distance_ptr + at, tl.where(valid, distance, 0.0), mask=inside)
    tl.store(values_ptr + at, tl.log(distance) - mean, mask=inside)


def _panel(features: Tensor, mask: Tensor | None, keys: Tensor, first_row: int) -> None:
    batch, n, channels = features.shape
    config = distance_config()
    block = config.blocks["BLOCK"]
    launch(
        distance_kernel, (batch * cdiv(keys.shape[1], block) * cdiv(n, block),), features,
        features, mask, keys, n, channels, first_row, keys.shape[1], *features.stride()[:2], batch_stride(mask),
        config=config,
    )  # fmt: skip


def _walk(
    features: Tensor, mask: Tensor | None, means: Tensor, closest: Tensor, widest: Tensor, neighbors: int
) -> None:
    """The means and the squared distances of samples that share a panel, or of one sample in several."""
    batch, n, channels = features.shape
    most = PANEL_BYTES // (4 * n) if 4 * n <= PANEL_BYTES else 1
    height = n if n <= most else most
    keys, config = workspace(features, (batch, height, n), torch.int32), select_config(n)
    whole = height == n
    for first in range(0, n, height):
        last = first if first + height <= n else n - height  # the last panel overlaps the one before
        _panel(features, mask, keys, last)
        launch(
            neighbors_kernel, (batch * height,), features,
            keys, means, n, channels, neighbors, last, height, config=config,
        )  # fmt: skip
    for first in range(0, n, height):
        last = first if first + height <= n else n - height
        if not whole:
            _panel(features, mask, keys, last)
        launch(
            closest_kernel, (batch * height,), features, keys, means, closest, widest, n, last, height, config=config
        )  # fmt: skip


def density_peaks(
    features: Tensor, k: int, *, neighbors: int = 5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices, counts, density, distance = fresh(*_fakes.density_peaks(features, k, neighbors=neighbors, mask=mask))
    check_not_float64("density_peaks", features=features)
    batch, n, channels = features.shape
    check_tokens("density_peaks", "features", n)
    features, flags = rows(features), mask_rows(mask)
    means, closest, widest, values = (workspace(features, (batch, n)) for _ in range(4))
    wanted = neighbors if neighbors < n else n
    group = PANEL_BYTES // (4 * n * n) if 0 < 4 * n * n <= PANEL_BYTES else 1
    begin = 0
    while n > 0 and begin < batch:
        some = slice(begin, begin + group if begin + group < batch else batch)
        marks = None if flags is None else flags[some]
        _walk(features[some], marks, means[some], closest[some], widest[some], wanted)
        begin += group
    config = select_config(n)
    blocks = cdiv(n, config.blocks["BLOCK_N"])
    launch(
        peak_kernel, (batch * blocks,), features,
        means, closest, widest, flags, density, distance, values, n, channels, blocks, batch_stride(flags),
        config=config,
    )  # fmt: skip
    _select(values, None, None, k, mask, True, indices, counts)
    return indices, counts, density, distance
