"""repulsion_sample on the CUDA emulator: all algorithms on the same inputs, launches, layouts, schedules, planner."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import DTYPES, NO_EMULATOR, over_dtypes
from tests.ops import test_repulsion as common
from tests.ops.test_repulsion import exact_case, exact_features, over_aggregates, over_potentials, same
from tokenprune_kernels import reference

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
GPU_DTYPES = DTYPES[:3]


def own_limits() -> Iterator[None]:
    """Every test may change them."""
    yield
    limits()


_own_limits = pytest.fixture(autouse=True)(own_limits)


def limits(
    tokens: int | None = None, matrices: int | None = None, fields: int | None = None, rounds: int | None = None
) -> None:
    """The planner's limits; those that are not given are those of the package."""
    module.set_repulsion_limits(
        module.GRAM_TOKEN_LIMIT if tokens is None else tokens,
        module.GRAM_BYTE_LIMIT if matrices is None else matrices,
        module.POINT_FIELD_LIMIT if fields is None else fields,
        module.ROUND_LIMIT if rounds is None else rounds,
    )


def go(way: str) -> None:
    """Small inputs go one of the three ways; as points, tokens may have as many channels as fit."""
    if way == "matrix":
        limits()
    else:
        limits(tokens=0, fields=2**30 if way == "points" else 0)


every_way = pytest.mark.parametrize("way", ["matrix", "points", "rounds"])
not_by_matrix = pytest.mark.parametrize("way", ["points", "rounds"])


def sample(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    picks, counts = tp.repulsion_sample(*args, **options, backend="emulator")
    return picks, counts


def kernels() -> list[str]:
    return [launch["kernel"].split("<")[0] for launch in module.take_launches()]


# --- the promises of test_repulsion.py, for small inputs the ways of large ones --------------------------------------


@not_by_matrix
@over_dtypes
@hypothesis_settings(deadline=None, max_examples=12, print_blob=True)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 150), channels=st.sampled_from([1, 3, 17, 64, 72]))
def test_exact_inputs(way: str, dtype: torch.dtype, seed: int, n: int, channels: int) -> None:
    if dtype == torch.float64:
        return
    go(way)  # not a fixture: hypothesis runs the body many times
    features, k, options = exact_case(seed, n, channels)
    k = min(k, 30)
    got = sample(features.to(dtype), k, **options)
    same(got, reference.repulsion_sample(features.double(), k, **options))
    assert (f"{way}_kernel" in kernels()) == (k > 0)


@not_by_matrix
@pytest.mark.parametrize(
    ("dtype", "with_positions"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, True)]
)
@over_aggregates
@over_potentials
def test_replay(way: str, dtype: torch.dtype, aggregate: str, potential: str, with_positions: bool) -> None:
    go(way)
    common.assert_replays(dtype, "emulator", aggregate, potential, with_positions)


@not_by_matrix
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_first_pick(way: str, dtype: torch.dtype) -> None:
    go(way)
    common.test_first_pick(dtype, "emulator")


@not_by_matrix
@over_aggregates
def test_edge_cases(way: str, aggregate: str) -> None:
    go(way)
    common.test_everything_is_picked_once("emulator", aggregate)
    common.test_nothing_to_pick("emulator", aggregate)
    common.test_seeds("emulator", aggregate)
    common.test_nan_and_infinite_energies("emulator", aggregate)


@not_by_matrix
def test_special_cases(way: str) -> None:
    go(way)
    common.test_maximal_marginal_relevance("emulator")
    common.test_large_riesz_exponent_is_max_min("emulator")


# --- ties ------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("first", ["outlier", "isolated", "seeds"])
@over_aggregates
@over_potentials
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float16, 72), (torch.bfloat16, 1), (torch.float32, 136)])
def test_identical_tokens_tie(
    dtype: torch.dtype, channels: int, potential: str, aggregate: str, first: str, way: str
) -> None:
    """Copies of a token have bitwise the same U whatever computed it, so the copy with the lower index goes first."""
    go(way)
    n, k = 70, 24
    base = torch.randn(1, n, channels).to(dtype)
    positions = torch.rand(1, n, 2)
    start: dict[str, Any] = {"first": first} if first != "seeds" else {"seed_indices": torch.tensor([[7, 11]])}
    picks, counts = sample(
        base.repeat(1, 3, 1), k, positions=positions.repeat(1, 3, 1), potential=potential, aggregate=aggregate,
        exponent=3.0, **start,
    )  # fmt: skip
    assert counts.item() == k
    step = torch.full((3 * n,), k).scatter(0, picks[0], torch.arange(k))
    if first == "seeds":
        assert not {7, 11} & set(picks[0].tolist())
        step[[7, 11]] = -1
    one, two, three = step.view(3, n)
    assert ((one < two) | (two == k)).all()
    assert ((two < three) | (three == k)).all()


def test_all_tokens_identical() -> None:
    for way in ("matrix", "points", "rounds"):
        go(way)
        for first in ("outlier", "isolated", "index"):
            picks, _ = sample(torch.randn(1, 1, 40).expand(2, 90, 40), 20, first=first)
            assert picks.tolist() == [list(range(20))] * 2


# --- rounds, seeds, counts -------------------------------------------------------------------------------------------


@over_aggregates
@over_potentials
def test_a_round_makes_many_picks(aggregate: str, potential: str) -> None:
    """Orthogonal tokens disturb all others alike: after the start, one round picks 64 of them, the lowest first."""
    options: dict[str, Any] = {"aggregate": aggregate, "potential": potential, "first": "index"}
    features = torch.eye(100).unsqueeze(0)
    limits(tokens=0, fields=0, rounds=3)
    picks, counts = sample(features, 66, **options)
    assert counts.tolist() == [66]
    assert picks.tolist() == [list(range(66))]
    limits(tokens=0, fields=0, rounds=2)  # of a sum, the second round makes its first pick and predicts the others
    assert sample(features, 66, **options)[1].tolist() == [65 if aggregate == "max" else 2]
    limits(tokens=0, fields=0, rounds=4)  # one for the seeds
    picks, counts = sample(features, 120, seed_indices=torch.tensor([[99, 3, 99, 200, -1, 40]]), **options)
    assert counts.tolist() == [97]
    assert picks[0, :97].tolist() == [i for i in range(100) if i not in (3, 40, 99)]
    assert (picks[0, 97:] == -1).all()


@pytest.mark.parametrize("options", [{}, {"aggregate": "sum"}, {"aggregate": "sum", "potential": "riesz"}], ids=str)
def test_rounds_are_few_on_clustered_tokens(options: dict[str, Any]) -> None:
    """Every centre has 16 tokens around it; still a round makes several of the 60 picks."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 64, generator=generator).repeat_interleave(16, 0)
    features = (centres + 0.5 * torch.randn(256, 64, generator=generator)).unsqueeze(0)
    go("rounds")
    complete = sample(features, 60, **options)
    assert complete[1].tolist() == [60]
    limits(tokens=0, fields=0, rounds=16)
    same(sample(features, 60, **options), complete)


@every_way
@over_aggregates
def test_fewer_tokens_than_picks(aggregate: str, way: str) -> None:
    """Masked tokens, seeds and a large k: the last ones are picked, and none twice."""
    go(way)
    features, mask = torch.randn(3, 140, 16), torch.rand(3, 140) < 0.6
    mask[1] = False
    seeds = torch.randint(-1, 140, (3, 20))
    picks, counts = sample(features, 150, mask=mask, seed_indices=seeds, aggregate=aggregate)
    for b in range(3):
        left = set(mask[b].nonzero().squeeze(1).tolist()) - set(seeds[b].tolist())
        assert counts[b] == len(left)
        assert set(picks[b, : len(left)].tolist()) == left
        assert (picks[b, len(left) :] == -1).all()


@every_way
@over_aggregates
def test_many_seeds(aggregate: str, way: str) -> None:
    """More of them than a round takes, in blocks of the search, in any order and repeated."""
    go(way)
    generator = torch.Generator().manual_seed(5)
    features = exact_features(generator, 2, 700, 64)
    seeds = torch.randint(-1, 700, (2, 300), generator=generator)
    options: dict[str, Any] = {"aggregate": aggregate, "seed_indices": seeds}
    same(sample(features, 12, **options), reference.repulsion_sample(features.double(), 12, **options))


# --- layouts, schedules, errors --------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [0, 5, 32, 71, 200])
def test_any_alignment(channels: int, dtype: torch.dtype, way: str) -> None:
    """Rows at odd addresses and of odd lengths, beside memory that must not enter."""
    go(way)
    generator = torch.Generator().manual_seed(channels)
    wanted = exact_features(generator, 2, 66, channels)
    expected = reference.repulsion_sample(wanted.double(), 12, first="isolated")
    for offset, width in ((0, channels), (1, channels + 3), (8, channels + 24 - channels % 8)):
        memory = torch.full((2, 70, width + offset), torch.nan, dtype=dtype)
        view = memory[:, 2:68, offset : offset + channels]
        view.copy_(wanted)
        same(sample(view, 12, first="isolated"), expected)
    same(sample(wanted.to(dtype).mT.contiguous().mT, 12, first="isolated"), expected)
    same(sample(wanted.to(dtype)[:1].expand(2, -1, -1), 12, first="isolated"), (expected[0][[0, 0]], expected[1]))


@every_way
def test_the_order_of_threads_does_not_matter(way: str) -> None:
    go(way)
    features, mask = torch.randn(2, 150, 72).half(), torch.rand(2, 150) < 0.9
    shared: dict[str, Any] = {"mask": mask, "positions": torch.rand(2, 150, 2)}
    calls: list[dict[str, Any]] = [
        {"first": "isolated"},
        {"first": "outlier", "aggregate": "sum", "potential": "riesz"},
        {"energy": torch.rand(2, 150), "potential": "gaussian", "seed_indices": torch.arange(70).repeat(2, 1)},
    ]
    for options in calls:
        results = []
        for schedule, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)):
            module.settings().schedule = getattr(module.Schedule, schedule)
            module.settings().seed = seed
            results.append(sample(features, 30, **shared, **options))
        for other in results[1:]:
            same(other, results[0])


@every_way
@pytest.mark.parametrize("first", ["outlier", "isolated"])
def test_a_refused_launch_is_reported(first: str, way: str) -> None:
    """Whichever it is; nothing is launched after it."""
    go(way)
    features, seeds = torch.randn(1, 40, 8), torch.tensor([[1]])
    sample(features, 2, first=first, seed_indices=seeds)
    count = len(module.take_launches())
    for n in range(1, count + 1):
        module.settings().fail_launch = n
        with pytest.raises(RuntimeError, match=r"tokenprune::repulsion_sample: CUDA error .* features \[1, 40, 8\]"):
            sample(features, 2, first=first, seed_indices=seeds)
        assert len(module.take_launches()) == n - 1
    module.settings().fail_launch = 0


# --- numerics --------------------------------------------------------------------------------------------------------


@every_way
def test_gaussian_with_infinite_sigma(way: str) -> None:
    """Every potential is 1 and the first of equals goes first; an infinite distance over an infinite sigma is NaN."""
    go(way)
    features, positions = torch.randn(1, 30, 8), torch.rand(1, 30, 2)
    positions[0, 3] = torch.inf
    options: dict[str, Any] = {"potential": "gaussian", "sigma": torch.inf, "positions": positions, "first": "index"}
    expected = [*(i for i in range(30) if i != 3), 3]
    for aggregate in ("max", "sum"):
        assert sample(features, 30, aggregate=aggregate, **options)[0].tolist() == [expected]
