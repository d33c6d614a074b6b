"""repulsion_sample in Triton: the steps depend on each other, so what counts is the latency of one.

Up to gram.GRAM_TOKENS tokens all inner products are stored (gram.py) and one program per sample makes all picks: the
states of all tokens stay in its registers, a step is one reduction over integer keys and one row of inner products.
Above that every step is a launch (repulsion_steps.py).

launch         grid              reads                                    writes
gram_kernel    see gram.py
start_kernel   B * token blocks  rows of inner products                   what the first pick minimises (outlier,
                                                                          isolated; other starts: no launch)
greedy_kernel  B                 one row of inner products per seed and   indices, counts
                                 step, positions of all tokens
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from . import repulsion_objective as u
from .gram import cosine_of, gram, gram_pitch, samples_at_once, stores_gram
from .order import best_candidate, index_of
from .repulsion_objective import Call, initial_state, next_seed, objective, updated_state
from .repulsion_steps import repulsion_in_steps
from .runtime import (
    Config,
    batch_stride,
    cdiv,
    check_indices,
    check_not_float64,
    fresh,
    launch,
    mask_rows,
    power_of_two,
    rows,
    workspace,
)


def greedy_config(n: int) -> Config:
    """All tokens in the registers of one program. Few warps where there are few tokens: their barriers are quicker."""
    block = power_of_two(n, 64, 4096)
    return Config({"BLOCK_N": block}, num_warps=1 if block <= 128 else 4 if block <= 1024 else 8)


def start_config(n: int) -> Config:
    if n <= 1024:
        return Config({"BLOCK_I": 8, "BLOCK_J": power_of_two(n, 64, 256)}, num_warps=4, num_stages=1)
    return Config({"BLOCK_I": 16, "BLOCK_J": 512}, num_warps=8, num_stages=1)


@triton.jit
def start_kernel(
    dots_ptr, inverse_ptr, mask_ptr, start_ptr, n, pitch, blocks, mask_stride,
    OUTLIER: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The sum of a token's cosines with the valid tokens, or the largest with another valid one (isolated).

    The sum is the cosine with the sum of the unit vectors, but for a positive factor that all tokens share.
    """
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    dots_ptr += sample * n * pitch
    inverse_ptr += sample * n
    own = tl.load(inverse_ptr + i, mask=i < n, other=0.0)
    if OUTLIER:
        result = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    else:
        result = tl.full([BLOCK_I, BLOCK_J], float("-inf"), tl.float32)
    for first in range(0, n, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        valid = j < n
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + sample * mask_stride + j, mask=j < n, other=0) != 0)
        inside = (i < n)[:, None] & valid[None, :]
        dots = tl.load(dots_ptr + i[:, None] * pitch + j[None, :], mask=inside, other=0.0)
        cosine = cosine_of(dots, own[:, None], tl.load(inverse_ptr + j, mask=valid, other=0.0)[None, :])
        if OUTLIER:
            result += tl.where(inside, cosine, 0.0)
        else:
            result = u.nan_max(result, tl.where(inside & (i[:, None] != j[None, :]), cosine, float("-inf")))
    if OUTLIER:
        value = tl.sum(result, 1)
    else:
        spoiled = tl.max((result != result).to(tl.int32), 1) > 0
        value = tl.max(tl.where(result != result, float("-inf"), result), 1)
        value = tl.where(spoiled, float("nan"), value)
    tl.store(start_ptr + sample * n + i, value, mask=i < n)


@triton.jit
def greedy_kernel(
    dots_ptr, inverse_ptr, start_ptr, positions_ptr, seeds_ptr, energy_ptr, mask_ptr, indices_ptr, counts_ptr,
    n, pitch, axes, n_seeds, steps, k, positions_batch, positions_token, seeds_batch, energy_batch, mask_batch,
    feature_weight, position_weight, half_exponent, epsilon, two_sigma2,
    KIND: tl.constexpr, SUM: tl.constexpr, POWER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_N)
    inside = token < n
    dots_ptr += sample * n * pitch
    inverse_ptr += sample * n
    indices_ptr += sample * k
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
        value = tl.load(start_ptr + sample * n + token, mask=inside, other=0.0)
    else:
        value = tl.zeros([BLOCK_N], tl.float32)
    state = initial_state(BLOCK_N, KIND, SUM)
    if seeds_ptr is not None:
        seeds_ptr += sample * seeds_batch
        seed = next_seed(seeds_ptr, n_seeds, -1, n, 128)
        started = seed < n
        while seed < n:
            dots = tl.load(dots_ptr + seed * pitch + token, mask=inside, other=0.0)
            cosine = cosine_of(dots, tl.load(inverse_ptr + seed), own)
            state = updated_state(
                state, cosine, seed, token, inside, positions_ptr, positions_token, axes,
                feature_weight, position_weight, half_exponent, epsilon, two_sigma2, KIND, SUM, POWER, BLOCK_N,
            )  # fmt: skip
            available = available & (token != seed)
            seed = next_seed(seeds_ptr, n_seeds, seed, n, 128)
        value = tl.where(started, objective(state, energy, half_exponent, epsilon, two_sigma2, KIND, SUM, POWER), value)

    count = 0
    for step in range(steps):
        best = best_candidate(value, available, token, False)
        pick = index_of(best)
        tl.store(indices_ptr + step, pick)
        count += (pick >= 0).to(tl.int32)
        chosen = tl.maximum(pick, 0)  # nothing is available any more where there was no pick
        dots = tl.load(dots_ptr + chosen * pitch + token, mask=inside, other=0.0)
        cosine = cosine_of(dots, tl.load(inverse_ptr + chosen), own)
        state = updated_state(
            state, cosine, chosen, token, inside, positions_ptr, positions_token, axes,
            feature_weight, position_weight, half_exponent, epsilon, two_sigma2, KIND, SUM, POWER, BLOCK_N,
        )  # fmt: skip
        available = available & (token != pick)
        value = objective(state, energy, half_exponent, epsilon, two_sigma2, KIND, SUM, POWER)
    for start in range(steps, k, BLOCK_N):
        slot = start + token
        tl.store(indices_ptr + slot, tl.full([BLOCK_N], -1, tl.int64), mask=slot < k)
    tl.store(counts_ptr + sample, count)


def repulsion_by_gram(call: Call, numbers: u.Weights, kind: int, total: bool, power: int) -> None:
    features, positions, seeds = call.features, call.positions, call.seeds
    batch, n, _ = features.shape
    k = call.indices.shape[1]
    dots, inverse = gram(features)
    pitch, start = gram_pitch(n), None
    if call.energy is None and call.first != "index":
        start, config = workspace(features, (batch, n)), start_config(n)
        blocks = cdiv(n, config.blocks["BLOCK_I"])
        launch(
            start_kernel, (batch * blocks,), features,
            dots, inverse, call.mask, start, n, pitch, blocks, batch_stride(call.mask),
            config=config, OUTLIER=call.first == "outlier",
        )  # fmt: skip
    launch(
        greedy_kernel, (batch,), features,
        dots, inverse, start, positions, seeds, call.energy, call.mask, call.indices, call.counts,
        n, pitch, 0 if positions is None else positions.shape[2], 0 if seeds is None else seeds.shape[1],
        min(k, n), k, batch_stride(positions), 0 if positions is None else positions.stride(1), batch_stride(seeds),
        batch_stride(call.energy), batch_stride(call.mask), *numbers,
        config=greedy_config(n), KIND=kind, SUM=total, POWER=power,
    )  # fmt: skip


def repulsion_sample(
    features: Tensor,
    k: int,
    *,
    positions: Tensor | None = None,
    seed_indices: Tensor | None = None,
    energy: Tensor | None = None,
    mask: Tensor | None = None,
    potential: str = "cosine",
    aggregate: str = "max",
    feature_weight: float = 1.0,
    position_weight: float = 1.0,
    exponent: float = 1.0,
    sigma: float = 1.0,
    epsilon: float = 1e-6,
    first: str = "outlier",
) -> tuple[Tensor, Tensor]:
    indices, counts = fresh(
        *_fakes.repulsion_sample(
            features, k, positions=positions, seed_indices=seed_indices, energy=energy, mask=mask,
            potential=potential, aggregate=aggregate, feature_weight=feature_weight, position_weight=position_weight,
            exponent=exponent, sigma=sigma, epsilon=epsilon, first=first,
        )
    )  # fmt: skip
    check_not_float64("repulsion_sample", features=features)
    batch, n, _ = features.shape
    if seed_indices is not None:
        check_indices("repulsion_sample", "seed_indices", seed_indices, n)
    coordinates = None if potential == "cosine" else rows(positions)
    call = Call(rows(features), coordinates, rows(seed_indices), rows(energy), mask_rows(mask), indices, counts, first)
    options = (
        u.weights(feature_weight, position_weight, exponent, epsilon, sigma), u.KINDS[potential], aggregate == "sum",
        u.power_of(exponent),
    )  # fmt: skip
    if not stores_gram(n):
        repulsion_in_steps(call, *options)
        return indices, counts
    begin, group = 0, samples_at_once(n)
    if batch <= group:
        repulsion_by_gram(call, *options)
        return indices, counts
    while begin < batch:
        repulsion_by_gram(call.samples(begin, min(begin + group, batch)), *options)
        begin += group
    return indices, counts
