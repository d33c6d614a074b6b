"""Every Triton kernel with a product of tiles on the worst matrix units there are (tensor_cores.py): what they cut off
does not add up over long vectors. The interpreter's own sums round to nearest, and would find nothing."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from testing import gpu_backend
from testing.cases import NO_TRITON
from tests.ops import test_attention, test_nms, test_repulsion, test_similarity
from tests.triton import test_attention as test_triton_attention
from tests.triton.tensor_cores import UNITS, WORST, Unit, interpreted_on, multiply

HALF = torch.float16
LONG = 4096
ROUNDINGS = 16 * torch.finfo(torch.float32).eps  # the floor of cases.assert_as_good_as_torch

needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


def label(unit: Unit) -> str:
    return f"group {unit.group}, extra {unit.extra}"


@pytest.fixture(params=WORST, ids=label)
def unit(request: pytest.FixtureRequest) -> Iterator[Unit]:
    """Products truncate; on a GPU they do so by themselves."""
    if gpu_backend.has_gpu():
        yield request.param
        return
    with interpreted_on(request.param):
        yield request.param


over_units = pytest.mark.parametrize("unit", UNITS, indirect=True, ids=label)
truncating = pytest.mark.usefixtures("unit")


def correlated(n: int, channels: int) -> Tensor:
    """Features [1, n, channels] that share most of what they are: products have one sign, and so have the errors."""
    return (0.5 + torch.rand(channels) + 0.1 * torch.rand(1, n, channels)).to(HALF)


def cosines(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return unit @ unit.mT


# --- the unit --------------------------------------------------------------------------------------------------------


def dot(*products: float, start: float = 0.0, unit: Unit) -> float:
    """The sum of these, given as squares of 16-bit numbers with their sign."""
    root = np.sqrt(np.abs(products))
    a, b = (root * np.sign(products)).astype(np.float16)[None], root.astype(np.float16)[:, None]
    assert (a[0].astype(np.float64) * b[:, 0] == products).all()
    return float(multiply(a, b, np.full((1, 1), start, np.float32), unit)[0, 0])


def test_what_lies_below_the_last_place_of_the_largest_is_cut_off() -> None:
    tiny = 2.0**-24  # half a unit in the last place of 1, a whole one below 1
    assert dot(1, tiny, tiny, unit=Unit(4, 0)) == 1
    assert dot(1, tiny, tiny, unit=Unit(4, 1)) == 1 + 2 * tiny
    assert dot(1, tiny, unit=Unit(4, 3)) == 1  # the sum is a float32
    assert dot(1, -tiny, unit=Unit(4, 0)) == 1
    assert dot(1, -tiny, unit=Unit(4, 1)) == 1 - tiny
    assert dot(-1, -tiny, -tiny, unit=Unit(4, 0)) == -1
    assert dot(tiny, tiny, start=1, unit=Unit(4, 0)) == 1  # the accumulator is one of them
    assert dot(tiny, tiny, 0, 0, 1, unit=Unit(4, 0)) == 1 + 2 * tiny  # these two are added before the 1 is
    assert dot(tiny, tiny, 0, 0, 1, unit=Unit(8, 0)) == 1
    assert dot(0, 0, unit=Unit(4, 0)) == 0


@pytest.mark.parametrize("unit", UNITS, ids=label)
def test_the_error_of_a_piece_stays_within_its_bound(unit: Unit) -> None:
    """docs/triton.md: (n / g) ((g + 1) 2^-e + 1) 2^-23 of the sum of all |products|, for n products."""
    generator = np.random.default_rng(0)
    for n in (16, 64, 128):
        for low in (-1, 0):
            a, b = (generator.uniform(low, 1, shape).astype(np.float16) for shape in ((20, n), (n, 30)))
            error = multiply(a, b, np.zeros((20, 30)), unit) - a.astype(np.float64) @ b
            bound = n / unit.group * ((unit.group + 1) * 2.0**-unit.extra + 1) * 2.0**-23
            assert (np.abs(error) <= bound * (np.abs(a).astype(np.float64) @ np.abs(b))).all()


def test_one_accumulator_drifts_and_pieces_do_not() -> None:
    a = correlated(20, LONG)[0].numpy()
    exact = a.astype(np.float64) @ a.T
    once = multiply(a, a.T, np.zeros_like(exact), WORST[0]) / exact - 1
    assert once.max() < -3e-5  # all of them towards zero
    pieces = sum(
        multiply(a[:, k : k + 64], a[:, k : k + 64].T, np.zeros_like(exact), WORST[0]) for k in range(0, LONG, 64)
    )
    assert np.abs(pieces / exact - 1).max() < ROUNDINGS


# --- the kernels -----------------------------------------------------------------------------------------------------


@needs_triton
@over_units
def test_inner_products_of_correlated_features(unit: Unit) -> None:
    from tokenprune_kernels.triton.gram import gram

    x = correlated(20, LONG)
    dots, inverse = gram(x)
    got = dots[..., :20] * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    assert (got.double() - cosines(x)).abs().max() <= ROUNDINGS


@needs_triton
@truncating
def test_the_most_similar_of_many_correlated_tokens() -> None:
    """isolated_kernel, whose products are not stored."""
    from tokenprune_kernels.triton.gram import inverse_norms, row_config
    from tokenprune_kernels.triton.repulsion_objective import Call
    from tokenprune_kernels.triton.repulsion_steps import SPLITS, _isolation
    from tokenprune_kernels.triton.runtime import target

    x = correlated(80, LONG)
    nothing = torch.empty(1, 0, dtype=torch.int64)
    start = torch.empty(1, SPLITS, 80)
    inverse = inverse_norms(x, row_config(target(x.device), x.element_size(), LONG))
    _isolation(Call(x, None, None, None, None, nothing, nothing, "isolated"), inverse, start)
    expected = cosines(x).masked_fill(torch.eye(80, dtype=torch.bool), -torch.inf).amax(-1)
    assert (start.amax(1).double() - expected).abs().max() <= ROUNDINGS


@needs_triton
@truncating
@pytest.mark.parametrize("channels", [72, 133])
def test_picks_by_cosines(channels: int) -> None:
    test_nms.test_every_pick_is_the_best_in_float64("triton", HALF, channels)


@needs_triton
@truncating
@pytest.mark.parametrize("aggregate", ["max", "sum"])
def test_repulsion_replays(aggregate: str) -> None:
    test_repulsion.assert_replays(HALF, "triton", aggregate, "riesz", with_positions=True)


@needs_triton
@truncating
@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("channels", [71, LONG])
def test_cosine_scores(channels: int, reduction: str) -> None:
    test_similarity.check_cosine(correlated(20, channels), correlated(7, channels), None, reduction, "triton")
    random = torch.randn(1, 20, channels).to(HALF), torch.randn(1, 7, channels).to(HALF)
    test_similarity.check_cosine(*random, torch.rand(1, 7) < 0.7, reduction, "triton")


@needs_triton
@truncating
def test_contrastive_scores() -> None:
    anchors, references = test_similarity.index_list(1, 30, 9), test_similarity.index_list(1, 30, 20)
    test_similarity.check_contrastive(correlated(30, LONG), anchors, references, "triton")


@needs_triton
@truncating
@pytest.mark.parametrize("seed", range(2))
def test_text_embeddings_by_cosine(seed: int) -> None:
    """AdaFV: one head of the model's width, softmax of 100 times the cosine, maximum over text rows."""
    torch.manual_seed(seed)
    query, key = test_attention.inputs(1, 1, 1, 20, 60, LONG, HALF)
    test_attention.check("triton", query, key, cosine=True, scale=100.0, query_reduction="max")


@needs_triton
@truncating
def test_correlated_embeddings_by_cosine() -> None:
    query, key = correlated(20, LONG).unsqueeze(1), correlated(60, LONG).unsqueeze(1)
    test_attention.check("triton", query, key, cosine=True, scale=100.0, query_reduction="max")


@needs_triton
@truncating
@pytest.mark.parametrize("dim", [64, 72, 96, 128, 144, 192, 256, 264, 67, 1024])
def test_attention_over_vectors_of_every_kind(dim: int) -> None:
    """In one piece, in two that share an accumulator, in two that do not, in a loop, and unaligned."""
    query, key = test_triton_attention.inputs(1, 2, 1, 9, 70, dim, dtype=HALF)
    test_triton_attention.check(query, key)
    test_triton_attention.check(query, key, cosine=True, scale=7.0)
    same_sign = query.abs(), key.abs()
    test_triton_attention.check(*same_sign)
