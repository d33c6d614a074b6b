"""Dot products on tensor cores that truncate: every kernel with mma keeps the bound of docs/kernels.md.

Sums of 4096 products of one sign, where what is cut off adds up. One accumulator for all of them would lose 1e-4.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
CHANNELS = 4096
EPS = 2.0**-23
RUN = 32  # products between two restarts
BOUND = (1.5 * RUN + CHANNELS / (2 * RUN)) * EPS  # of |error| / sum |x y|
TYPICAL = 3e-6  # on features like those below, where the bound is far from what happens
MMA = {"truncate": [(4, 0), (4, 3), (8, 1), (16, 0), (16, 2)], "nearest": [(4, 0)]}


@pytest.fixture(params=[(rounding, *how) for rounding, all_of in MMA.items() for how in all_of], ids=str)
def tensor_core(request) -> None:
    settings = module.settings()  # conftest.py resets them
    rounding, settings.mma_group, settings.mma_extra_bits = request.param
    settings.mma_rounding = getattr(module.MmaRounding, rounding)


def features(n: int, dtype: torch.dtype, channels: int = CHANNELS) -> Tensor:
    """Rows that resemble each other."""
    return (1 + 0.5 * torch.rand(1, channels) + 0.2 * torch.randn(n, channels)).abs().to(dtype)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    unit_x, unit_y = (t.double() / t.double().norm(dim=-1, keepdim=True) for t in (x, y))
    return unit_x @ unit_y.mT


def error_of_logits(dtype: torch.dtype, rows: int, keys: int = 1, channels: int = CHANNELS) -> float:
    """The logit of a key is the row's lse, but for the logarithm of how many keys are equal to it."""
    query, key = features(rows, dtype, channels), features(1, dtype, channels)
    all_keys = key.expand(1, 1, keys, channels)
    _, lse = tp.attention_entropy(query[None, None], all_keys, scale=1.0, backend="emulator")
    exact = (query.double() @ key.double().mT)[:, 0]
    return float(((lse[0, 0].double() - math.log(keys) - exact) / exact).abs().max())


def error_of_columns(dtype: torch.dtype) -> float:
    """With lse 0 a probability is the exponential of the logit."""
    query, key = features(3, dtype), features(70, dtype)
    scale = 1 / float(query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max())
    probability = tp.attention_scores(
        query[None, None],
        key[None, None],
        torch.zeros(1, 1, 3),
        scale=scale,
        query_reduction="last",
        backend="emulator",
    )
    exact = scale * (key.double() @ query[-1].double())
    return float((probability[0].double().log() - exact).abs().max()) - 4 * EPS  # of the exponential


def error_of_cosines(dtype: torch.dtype) -> float:
    x, y = features(70, dtype), features(20, dtype)
    got = tp.cosine_scores(x[None], y[None], backend="emulator")[0]
    return float((got.double() - cosines(x, y).amax(-1)).abs().max())


def error_of_picks(dtype: torch.dtype, gram: bool, n: int = 160) -> float:
    """A pick minimises a cosine plus an energy; half of what it is above the minimum.

    The last rows are orthogonal to the seed, so that nothing is cut off their sums, and lie 1e-5 below the others.
    """
    x = features(n, dtype)
    x[:-9, -64:], x[-9:, :-64] = 0, 0
    cosine, objective = cosines(x, x[:1])[:, 0], 1e-7 * torch.randperm(n).double()
    objective[:-9] += 1e-5
    energy = (objective - cosine).float()
    module.settings().sm_count = 1  # little enough for the large tiles
    seed = torch.zeros(1, 1, dtype=torch.long)
    others = (module.GRAM_BYTE_LIMIT, 0, module.ROUND_LIMIT)  # no points: they use no tensor cores
    module.set_repulsion_limits(n if gram else 0, *others)
    try:
        pick = tp.repulsion_sample(x[None], 1, seed_indices=seed, energy=energy[None], backend="emulator")[0][0, 0]
    finally:
        defaults = (module.GRAM_TOKEN_LIMIT, module.GRAM_BYTE_LIMIT, module.POINT_FIELD_LIMIT, module.ROUND_LIMIT)
        module.set_repulsion_limits(*defaults)
    return float(objective[pick] - objective[1:].min()) / 2


def error_of_suppression(dtype: torch.dtype, k: int, architecture: int = 90) -> float:
    """The cosine of the first two picks, from what the first one left of the second one's score."""
    module.settings().architecture = architecture
    n, sigma = 20, 0.1
    x, scores = features(n, dtype), torch.linspace(1, 0.99, n)
    picks, selected, _ = tp.spatial_semantic_nms(
        scores[None], x[None], torch.zeros(1, n, 2), k, sigma_spatial=math.inf, sigma_semantic=sigma, backend="emulator"
    )
    a, b = picks[0, :2].tolist()
    weight = 1 - float(selected[0, 1]) / float(scores[b])
    slope = (1 - weight) / weight  # a rounding of the score, in the weight
    cosine = 1 - sigma * math.sqrt(-2 * math.log(weight))
    of_roundings = 8 * EPS * (1 + slope) * sigma / math.sqrt(-2 * math.log(weight))
    return abs(cosine - float(cosines(x[a : a + 1], x[b : b + 1]))) - of_roundings


def error_of_distances(dtype: torch.dtype) -> float:
    """The squared distance of two tokens, whose products and squares may all err."""
    x = features(2, dtype)
    distance = tp.density_peaks(x[None], 1, backend="emulator")[3][0, 0].double()
    exact = x.double().diff(dim=0).square().sum()
    return float((distance.square() * CHANNELS - exact).abs() / (4 * x.double().square().sum(-1).max()))


CASES: dict[str, Callable[[torch.dtype], float]] = {
    "attention_rows_thin": lambda dtype: error_of_logits(dtype, 3),
    "attention_rows_wide": lambda dtype: error_of_logits(dtype, 40),
    "attention_columns": error_of_columns,
    "tile_similarity": error_of_cosines,
    "gram_kernel": lambda dtype: error_of_picks(dtype, True),
    "rounds_kernel": lambda dtype: error_of_picks(dtype, False),
    "density_products": error_of_distances,
    "nms_weights": lambda dtype: error_of_suppression(dtype, 4),
    "nms_lists": lambda dtype: error_of_suppression(dtype, 4, architecture=80),
    "nms_select": lambda dtype: error_of_suppression(dtype, 2),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("kernel", CASES)
def test_dot_products_keep_the_bound(kernel, dtype, tensor_core):
    module.take_launches()
    found = CASES[kernel](dtype)
    launched = [launch["kernel"] for launch in module.take_launches()]
    assert any(name.startswith(kernel) for name in launched), launched
    norms = 4 * EPS  # of the norms, the division and the last rounding
    assert found <= BOUND + norms
    assert found <= TYPICAL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 40], ids=["thin", "wide"])
def test_the_first_products_of_attention_keep_their_bound(rows, dtype, tensor_core):
    """A whole tile of attention has up to 128 products in an accumulator before the first restart."""
    roundings = 4 * EPS  # of lse
    assert error_of_logits(dtype, rows, keys=64, channels=128) <= (1.5 * 128 + 0.5) * EPS + roundings
