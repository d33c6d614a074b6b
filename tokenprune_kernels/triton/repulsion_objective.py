"""The objective U of repulsion_sample in Triton, one selected token at a time.

What a token keeps of the selected ones, its state, is for `sum` the total of the potentials, and for `max` the largest
cosine or the smallest r2: phi falls with r2, so that phi is evaluated once per token and step and NaN stays NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .runtime import float32

COSINE = tl.constexpr(0)
RIESZ = tl.constexpr(1)
GAUSSIAN = tl.constexpr(2)
KINDS = {"cosine": 0, "riesz": 1, "gaussian": 2}


class Weights(NamedTuple):
    """The formula's numbers as float32, in the order in which kernels take them."""

    feature: float  # twice feature_weight
    position: float
    half_exponent: float
    epsilon: float
    two_sigma2: float


def weights(feature: float, position: float, exponent: float, epsilon: float, sigma: float) -> Weights:
    numbers = (2 * feature, position, exponent / 2, epsilon, 2 * sigma * sigma)
    return Weights(*(float32(number) for number in numbers))


class Call(NamedTuple):
    """A call: its tensors, in layouts that the kernels take, and the kind of the first pick."""

    features: Tensor
    positions: Tensor | None
    seeds: Tensor | None
    energy: Tensor | None
    mask: Tensor | None
    indices: Tensor
    counts: Tensor
    first: str

    def samples(self, begin: int, end: int) -> "Call":
        return Call._make(t[begin:end] if isinstance(t, Tensor) else t for t in self)


def power_of(exponent: float) -> int:
    """r2**(exponent / 2) for which there is something better than a power: 1 for the root, 2 for r2 itself, else 0."""
    return 1 if exponent == 1 else 2 if exponent == 2 else 0


@triton.jit
def nan_max(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def squared_distances(positions_ptr, token_stride, token, inside, pick, axes, BLOCK: tl.constexpr):
    """||p_i - p_pick||^2 from differences, exact on integer grids."""
    distance = tl.zeros([BLOCK], tl.float32)
    for axis in range(axes):
        own = tl.load(positions_ptr + token * token_stride + axis, mask=inside, other=0.0).to(tl.float32)
        difference = own - tl.load(positions_ptr + pick * token_stride + axis).to(tl.float32)
        distance += difference * difference
    return distance


@triton.jit
def initial_state(BLOCK: tl.constexpr, KIND: tl.constexpr, SUM: tl.constexpr):
    """The state before any token is selected."""
    if SUM:
        state = tl.zeros([BLOCK], tl.float32)
    elif KIND == COSINE:
        state = tl.full([BLOCK], float("-inf"), tl.float32)
    else:
        state = tl.full([BLOCK], float("inf"), tl.float32)
    return state


@triton.jit
def phi_of(r2, half_exponent, epsilon, two_sigma2, KIND: tl.constexpr, POWER: tl.constexpr):
    if KIND == GAUSSIAN:
        phi = tl.exp(tl.div_rn(-r2, two_sigma2))
    else:
        r2 = tl.where(r2 < 0, 0.0, r2)  # the cosine of near-duplicates can round above 1
        if POWER == 1:
            power = tl.sqrt_rn(r2)
        elif POWER == 2:
            power = r2
        else:
            power = tl.where(r2 == 1, 1.0, tl.exp2(half_exponent * tl.log2(r2)))
        phi = tl.div_rn(1.0, power + epsilon)
    return phi


@triton.jit
def updated_state(
    state, cosine, pick, token, inside, positions_ptr, token_stride, axes,
    feature_weight, position_weight, half_exponent, epsilon, two_sigma2,
    KIND: tl.constexpr, SUM: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The states of tokens with these cosines to `pick` when it is selected too. Maximum and minimum keep NaN."""
    if KIND == COSINE:
        if SUM:
            state += cosine
        else:
            state = nan_max(state, cosine)
    else:
        r2 = feature_weight * (1 - cosine)
        if positions_ptr is not None:
            r2 += position_weight * squared_distances(positions_ptr, token_stride, token, inside, pick, axes, BLOCK)
        if SUM:
            state += phi_of(r2, half_exponent, epsilon, two_sigma2, KIND, POWER)
        else:
            if KIND == GAUSSIAN:
                # exp(-inf / inf) is NaN although the smallest r2 may be finite.
                r2 = tl.where((r2 == float("inf")) & (two_sigma2 == float("inf")), float("nan"), r2)
            state = tl.where((state < r2) | (state != state), state, r2)
    return state


@triton.jit
def objective(
    state, energy, half_exponent, epsilon, two_sigma2, KIND: tl.constexpr, SUM: tl.constexpr, POWER: tl.constexpr
):
    """U from the state; `energy` is None or one number per token."""
    value = state
    if not SUM and KIND != COSINE:
        value = phi_of(state, half_exponent, epsilon, two_sigma2, KIND, POWER)
    if energy is not None:
        value += energy
    return value


@triton.jit
def next_seed(seeds_ptr, n_seeds, after, n, BLOCK_S: tl.constexpr):
    """The smallest entry above `after` that names one of the n tokens, or n: ascending, and each seed once."""
    best = tl.zeros([BLOCK_S], tl.int64) + n
    for start in range(0, n_seeds, BLOCK_S):
        entry = start + tl.arange(0, BLOCK_S)
        seed = tl.load(seeds_ptr + entry, mask=entry < n_seeds, other=-1)
        best = tl.minimum(best, tl.where((seed > after) & (seed >= 0), seed, n))
    return tl.min(best, 0)
