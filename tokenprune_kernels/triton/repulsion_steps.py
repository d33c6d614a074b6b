"""repulsion_sample in Triton for many tokens: one launch per pick, in which the whole GPU updates all tokens.

The programs of a launch each own a block of tokens. They all reduce the candidates that the blocks left in the launch
before, in the same order, and so agree on the pick without talking to each other; then each applies the pick to its
tokens and leaves the best of them in the other half of a double buffer.

launch                 grid                 reads                           writes
inverse_norms_kernel   see gram.py
direction_kernel       B * parts * columns  1/PARTS of the tokens           1/PARTS of the sum of unit vectors (outlier)
outlier_kernel         B * token blocks     its tokens, all parts           their products with the sum
isolated_kernel        B * splits * blocks  1/SPLITS of the tokens          the largest cosines with these (isolated)
begin_kernel           B * token blocks     its tokens once per seed        states, candidates of the blocks, padding
step_kernel, k times   B * token blocks     candidates, its tokens          states, candidates, the pick
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import repulsion_objective as u
from .gram import best_block, best_of_blocks, cosine_of, gram_config, inverse_norms, large_tiles, row_config, row_dots
from .order import best_candidate, index_of
from .product import add_product
from .repulsion_objective import Call, initial_state, nan_max, next_seed, objective, updated_state
from .runtime import Config, batch_stride, cdiv, launch, power_of_two, target, workspace

PARTS = 16  # of the tokens, for the sum of their unit vectors
SPLITS = 8  # of the tokens, with which programs look for the most similar one


def direction_config(channels: int) -> Config:
    return Config({"BLOCK_I": 16, "BLOCK_C": power_of_two(channels, 32, 128)}, num_warps=4, num_stages=1)


@triton.jit
def direction_kernel(
    features_ptr, inverse_ptr, mask_ptr, direction_ptr, n, channels, columns, share, features_batch, row_stride,
    mask_batch, PARTS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum of the unit vectors of the valid tokens of one part, for some of the channels."""
    part = (tl.program_id(0) // columns).to(tl.int64)  # of all samples
    sample = part // PARTS
    channel = (tl.program_id(0) % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = (part % PARTS) * share
    end = tl.minimum(begin + share, n)
    features_ptr += sample * features_batch
    total = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for first in range(0, share, BLOCK_I):
        i = begin + first + tl.arange(0, BLOCK_I)
        valid = i < end
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + sample * mask_batch + i, mask=i < end, other=0) != 0)
        inside = valid[:, None] & (channel < channels)[None, :]
        x = tl.load(features_ptr + i[:, None] * row_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + sample * n + i, mask=valid, other=0.0)
        total += x * inverse[:, None]
    tl.store(direction_ptr + part * channels + channel, tl.sum(total, 0), mask=channel < channels)


@triton.jit
def outlier_kernel(
    features_ptr, inverse_ptr, direction_ptr, start_ptr, n, channels, blocks, features_batch, row_stride,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A token's product with the sum of all unit vectors: their cosine but for a positive factor all tokens share."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < n
    features_ptr += sample * features_batch
    direction_ptr += sample * PARTS * channels
    part = tl.arange(0, PARTS).to(tl.int64)
    dots = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        in_row = channel < channels
        parts = tl.load(
            direction_ptr + part[:, None] * channels + channel[None, :], mask=(part < PARTS)[:, None] & in_row[None, :],
            other=0.0,
        )  # fmt: skip
        x = tl.load(
            features_ptr + token[:, None] * row_stride + channel[None, :],
            mask=inside[:, None] & in_row[None, :],
            other=0.0,
        )
        dots += x.to(tl.float32) * tl.sum(parts, 0)[None, :]
    inverse = tl.load(inverse_ptr + sample * n + token, mask=inside, other=0.0)
    tl.store(start_ptr + sample * n + token, tl.sum(dots, 1) * inverse, mask=inside)


@triton.jit
def isolated_kernel(
    features_ptr, inverse_ptr, mask_ptr, start_ptr, n, channels, blocks, features_batch, row_stride, mask_batch,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest cosine of each token of a block with another valid one, among 1 / SPLITS of the sample's tokens."""
    split = tl.program_id(0) // blocks  # of all samples
    sample = (split // SPLITS).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    features_ptr += sample * features_batch
    inverse_ptr += sample * n
    own = tl.load(inverse_ptr + i, mask=i < n, other=0.0)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    spoiled = tl.zeros([BLOCK], tl.int32)
    for first in range((split % SPLITS) * BLOCK, n, SPLITS * BLOCK):
        j = first + tl.arange(0, BLOCK).to(tl.int64)
        valid = j < n
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + sample * mask_batch + j, mask=j < n, other=0) != 0)
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            inside = channel < channels
            a = tl.load(
                features_ptr + i[:, None] * row_stride + channel[None, :],
                mask=(i < n)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                features_ptr + j[None, :] * row_stride + channel[:, None],
                mask=valid[None, :] & inside[:, None], other=0.0,
            )  # fmt: skip
            dots = add_product(a, b, dots)
        cosine = cosine_of(dots, own[:, None], tl.load(inverse_ptr + j, mask=valid, other=0.0)[None, :])
        cosine = tl.where(valid[None, :] & (i[:, None] != j[None, :]), cosine, float("-inf"))
        spoiled = tl.maximum(spoiled, tl.max((cosine != cosine).to(tl.int32), 1))
        largest = tl.maximum(largest, tl.max(tl.where(cosine != cosine, float("-inf"), cosine), 1))
    tl.store(start_ptr + split.to(tl.int64) * n + i, tl.where(spoiled > 0, float("nan"), largest), mask=i < n)


@triton.jit
def begin_kernel(
    features_ptr, inverse_ptr, start_ptr, positions_ptr, seeds_ptr, energy_ptr, mask_ptr,
    state_ptr, available_ptr, best_ptr, indices_ptr, counts_ptr,
    n, channels, blocks, axes, n_seeds, k, features_batch, row_stride, positions_batch, positions_token, seeds_batch,
    energy_batch, mask_batch, feature_weight, position_weight, half_exponent, epsilon, two_sigma2,
    KIND: tl.constexpr, SUM: tl.constexpr, POWER: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    token = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < n
    features_ptr += sample * features_batch
    inverse_ptr += sample * n
    if positions_ptr is not None:
        positions_ptr += sample * positions_batch
    own = tl.load(inverse_ptr + token, mask=inside, other=0.0)
    available = inside
    if mask_ptr is not None:
        available = inside & (tl.load(mask_ptr + sample * mask_batch + token, mask=inside, other=0) != 0)
    energy = None
    if energy_ptr is not None:
        energy = tl.load(energy_ptr + sample * energy_batch + token, mask=inside, other=0.0).to(tl.float32)

    if energy_ptr is not None:
        value = energy
    elif start_ptr is not None:
        value = tl.load(start_ptr + sample * SPLITS * n + token, mask=inside, other=0.0)
        for split in tl.static_range(1, SPLITS):
            value = nan_max(value, tl.load(start_ptr + (sample * SPLITS + split) * n + token, mask=inside, other=0.0))
    else:
        value = tl.zeros([BLOCK_T], tl.float32)
    state = initial_state(BLOCK_T, KIND, SUM)
    if seeds_ptr is not None:
        seeds_ptr += sample * seeds_batch
        seed = next_seed(seeds_ptr, n_seeds, -1, n, 128)
        started = seed < n
        while seed < n:
            dots = row_dots(features_ptr, token, inside, seed, channels, row_stride, BLOCK_T, BLOCK_C)
            cosine = cosine_of(dots, tl.load(inverse_ptr + seed), own)
            state = updated_state(
                state, cosine, seed, token, inside, positions_ptr, positions_token, axes,
                feature_weight, position_weight, half_exponent, epsilon, two_sigma2, KIND, SUM, POWER, BLOCK_T,
            )  # fmt: skip
            available = available & (token != seed)
            seed = next_seed(seeds_ptr, n_seeds, seed, n, 128)
        value = tl.where(started, objective(state, energy, half_exponent, epsilon, two_sigma2, KIND, SUM, POWER), value)

    tl.store(state_ptr + sample * n + token, state, mask=inside)
    tl.store(available_ptr + sample * n + token, available.to(tl.uint8), mask=inside)
    best = best_candidate(value, available, token, False)
    tl.store(best_ptr + sample * 2 * blocks + block, best)
    for start in range(block * BLOCK_T, k, blocks * BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)
        tl.store(indices_ptr + sample * k + slot, tl.full([BLOCK_T], -1, tl.int64), mask=slot < k)
    if block == 0:
        tl.store(counts_ptr + sample, sample * 0)


@triton.jit(do_not_specialize=["step"])
def step_kernel(
    features_ptr, inverse_ptr, positions_ptr, energy_ptr, state_ptr, available_ptr, best_ptr, indices_ptr, counts_ptr,
    step, steps, n, channels, blocks, axes, k, features_batch, row_stride, positions_batch, positions_token,
    energy_batch, feature_weight, position_weight, half_exponent, epsilon, two_sigma2,
    KIND: tl.constexpr, SUM: tl.constexpr, POWER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    best_ptr += sample * 2 * blocks
    pick = index_of(best_of_blocks(best_ptr + (step % 2) * blocks, blocks, BLOCK_B))
    if (block == 0) & (pick >= 0):
        tl.store(indices_ptr + sample * k + step, pick)
        tl.store(counts_ptr + sample, (step + 1).to(tl.int64))
    best_ptr += (1 - step % 2) * blocks + block
    if (pick < 0) | (step + 1 == steps):
        tl.store(best_ptr, tl.zeros([], tl.int64))  # no candidate is left, or no pick wanted
    else:
        token = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = token < n
        features_ptr += sample * features_batch
        inverse_ptr += sample * n
        at = sample * n + token
        if positions_ptr is not None:
            positions_ptr += sample * positions_batch
        dots = row_dots(features_ptr, token, inside, pick, channels, row_stride, BLOCK_T, BLOCK_C)
        own = tl.load(inverse_ptr + token, mask=inside, other=0.0)
        cosine = cosine_of(dots, tl.load(inverse_ptr + pick), own)
        state = updated_state(
            tl.load(state_ptr + at, mask=inside, other=0.0), cosine,
            pick, token, inside, positions_ptr, positions_token, axes,
            feature_weight, position_weight, half_exponent, epsilon, two_sigma2, KIND, SUM, POWER, BLOCK_T,
        )  # fmt: skip
        available = (tl.load(available_ptr + at, mask=inside, other=0) != 0) & (token != pick)
        energy = None
        if energy_ptr is not None:
            energy = tl.load(energy_ptr + sample * energy_batch + token, mask=inside, other=0.0).to(tl.float32)
        value = objective(state, energy, half_exponent, epsilon, two_sigma2, KIND, SUM, POWER)
        # Several threads may hold the same token: all of them must have read it before one overwrites it.
        tl.debug_barrier()
        tl.store(state_ptr + at, state, mask=inside)
        tl.store(available_ptr + at, available.to(tl.uint8), mask=inside)
        tl.store(best_ptr, best_candidate(value, available, token, False))


def _outliers(call: Call, inverse: Tensor, start: Tensor, config: Config) -> None:
    features = call.features
    batch, n, channels = features.shape
    direction = workspace(features, (batch, PARTS, channels))
    parts = direction_config(channels)
    columns, blocks = cdiv(channels, parts.blocks["BLOCK_C"]), cdiv(n, config.blocks["BLOCK_T"])
    launch(
        direction_kernel, (batch * PARTS * columns,), features,
        features, inverse, call.mask, direction, n, channels, columns, cdiv(n, PARTS), features.stride(0),
        features.stride(1), batch_stride(call.mask), config=parts, PARTS=PARTS,
    )  # fmt: skip
    launch(
        outlier_kernel, (batch * blocks,), features,
        features, inverse, direction, start, n, channels, blocks, features.stride(0), features.stride(1),
        config=config, PARTS=PARTS,
    )  # fmt: skip


def _isolation(call: Call, inverse: Tensor, start: Tensor) -> None:
    features = call.features
    batch, n, channels = features.shape
    config = gram_config(target(features.device), features.element_size(), large_tiles(batch, n))
    blocks = cdiv(n, config.blocks["BLOCK"])
    launch(
        isolated_kernel, (batch * SPLITS * blocks,), features,
        features, inverse, call.mask, start, n, channels, blocks, features.stride(0), features.stride(1),
        batch_stride(call.mask), config=config, SPLITS=SPLITS,
    )  # fmt: skip


def repulsion_in_steps(call: Call, numbers: u.Weights, kind: int, total: bool, power: int) -> None:
    features, positions, seeds, energy = call.features, call.positions, call.seeds, call.energy
    batch, n, channels = features.shape
    k = call.indices.shape[1]
    config = row_config(target(features.device), features.element_size(), channels)
    blocks = cdiv(n, config.blocks["BLOCK_T"])
    inverse, start, splits = inverse_norms(features, config), None, 1
    if energy is None and call.first != "index":
        splits = SPLITS if call.first == "isolated" else 1
        start = workspace(features, (batch, splits, n))
        if call.first == "outlier":
            _outliers(call, inverse, start, config)
        else:
            _isolation(call, inverse, start)
    state = workspace(features, (batch, n))
    available = workspace(features, (batch, n), torch.uint8)
    best = workspace(features, (batch, 2, blocks), torch.int64)
    axes, token_stride = (0, 0) if positions is None else (positions.shape[2], positions.stride(1))
    options = {"KIND": kind, "SUM": total, "POWER": power}
    launch(
        begin_kernel, (batch * blocks,), features,
        features, inverse, start, positions, seeds, energy, call.mask, state, available, best, call.indices,
        call.counts, n, channels, blocks, axes, 0 if seeds is None else seeds.shape[1], k, features.stride(0),
        features.stride(1), batch_stride(positions), token_stride, batch_stride(seeds), batch_stride(energy),
        batch_stride(call.mask), *numbers, config=config, SPLITS=splits, **options,
    )  # fmt: skip
    step = 0
    while step < k and step < n:
        launch(
            step_kernel, (batch * blocks,), features,
            features, inverse, positions, energy, state, available, best, call.indices, call.counts,
            step, min(k, n), n, channels, blocks, axes, k, features.stride(0), features.stride(1),
            batch_stride(positions), token_stride, batch_stride(energy), *numbers,
            config=config, BLOCK_B=best_block(blocks), **options,
        )  # fmt: skip
        step += 1
