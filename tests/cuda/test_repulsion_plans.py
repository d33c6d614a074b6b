"""repulsion_sample on the CUDA emulator: which kernels are launched for which shapes and devices, and the planner."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import emulator
from testing.cases import NO_EMULATOR
from tests.cuda.test_repulsion import GPU_DTYPES, go, kernels, limits, not_by_matrix, own_limits, sample
from tests.ops.test_repulsion import exact_features, same
from tokenprune_kernels import reference

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
LARGEST_GRID = 2**31 - 1
_own_limits = pytest.fixture(autouse=True)(own_limits)


# --- what is launched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({"first": "index"}, ["gram_kernel", "gram_greedy_kernel"]),
        ({"energy": torch.zeros(2, 70)}, ["gram_kernel", "gram_greedy_kernel"]),
        ({"first": "outlier"}, ["gram_kernel", "gram_rows_kernel", "gram_greedy_kernel"]),
        ({"first": "isolated"}, ["gram_kernel", "gram_rows_kernel", "gram_greedy_kernel"]),
    ],
    ids=["index", "energy", "outlier", "isolated"],
)
@pytest.mark.parametrize("potential", ["cosine", "riesz", "gaussian"])
def test_launches_with_a_matrix(options: dict[str, Any], launches: list[str], potential: str) -> None:
    """Potentials other than the cosine are worked out beforehand, with the start if there is one."""
    options = {**options, "potential": potential}
    if potential != "cosine":
        launches = ["gram_kernel", "gram_rows_kernel", "gram_greedy_kernel"]
    features = torch.randn(2, 70, 24)
    sample(features, 9, **options)
    assert kernels() == launches
    sample(features, 0, **options)
    assert kernels() == ["gram_greedy_kernel"]
    sample(features[:0], 9, **{**options, "energy": None})
    assert kernels() == []


@not_by_matrix
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("k", [1, 9])
def test_launches_without_a_matrix(way: str, batch: int, k: int) -> None:
    """At most three, whatever k and the seeds are."""
    go(way)
    features, picks = torch.randn(batch, 70, 24), f"{way}_kernel"
    sample(features, k, first="index")
    assert kernels() == ["prepare_kernel", picks]
    sample(features, k, seed_indices=torch.arange(65).repeat(batch, 1), energy=torch.zeros(batch, 70))
    assert kernels() == ["prepare_kernel", picks]
    sample(features, k)
    assert kernels() == ["prepare_kernel", "outlier_keys_kernel", picks]
    sample(features, k, first="isolated")
    assert kernels() == ["prepare_kernel", "isolated_keys_kernel", picks]


@pytest.mark.parametrize(
    ("batch", "sm_count", "grid"),
    [(1, 132, 2), (3, 132, 6), (3, 2, 3), (5, 2, 4), (3, 1, 2)],
    ids=["one sample", "a group per sample", "no place for two blocks", "groups with two samples", "two blocks"],
)
def test_groups_of_blocks(batch: int, sm_count: int, grid: int) -> None:
    """Two blocks of rounds fit into a multiprocessor, and 70 tokens are two tiles."""
    features, seeds = torch.randn(batch, 70, 24), torch.randint(-1, 70, (batch, 2))
    options: list[dict[str, Any]] = [{"aggregate": "sum"}, {"seed_indices": seeds, "mask": torch.rand(batch, 70) < 0.8}]
    for calls in options:
        go("matrix")
        expected = sample(features, 20, **calls)
        go("rounds")
        module.settings().sm_count = sm_count
        module.take_launches()
        same(sample(features, 20, **calls), expected)
        launches = module.take_launches()
        assert [launch["grid"][0] for launch in launches[1:]] == [grid] * 2
        assert [launch["cooperative"] for launch in launches] == [False] + [grid > batch] * 2
        module.settings().sm_count = 132


def test_a_device_whose_blocks_cannot_wait_for_each_other() -> None:
    """Every sample has one block then."""
    go("rounds")
    features = torch.randn(2, 150, 24)
    expected = sample(features, 30)
    module.settings().cooperative = False
    module.take_launches()
    same(sample(features, 30), expected)
    assert [(entry["grid"][0], entry["cooperative"]) for entry in module.take_launches()[1:]] == [(2, False)] * 2


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("n", [40, 300])
def test_points_of_a_cluster_and_of_a_block(architecture: int, n: int) -> None:
    """Architectures without clusters have a block per sample, with up to four tokens per thread."""
    go("points")
    generator = torch.Generator().manual_seed(n)
    features, seeds = exact_features(generator, 2, n, 20), torch.randint(-1, n, (2, 7), generator=generator)
    module.settings().architecture = architecture
    for options in ({}, {"seed_indices": seeds, "aggregate": "sum", "first": "index"}):
        options = {"first": "isolated", **options}
        module.take_launches()
        got = sample(features, 30, **options)
        assert module.take_launches()[-1]["cluster"] == (8 if architecture >= 90 else 1)
        same(got, reference.repulsion_sample(features.double(), 30, **options))


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_large_tiles_compute_the_same_matrix(dtype: torch.dtype) -> None:
    """They are for devices that many small tiles would occupy anyway."""
    features = torch.randn(2, 200, 80).to(dtype)
    small = sample(features, 40)
    assert [launch["block"][0] for launch in module.take_launches()] == [128, 256, 128]
    module.settings().sm_count = 3
    large = sample(features, 40)
    assert [launch["block"][0] for launch in module.take_launches()] == [256, 256, 128]
    same(large, small)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "parts"), [(255, 1), (256, 2), (600, 4), (1024, 8), (1030, 8)])
def test_blocks_share_a_tile_by_channels(channels: int, parts: int, dtype: torch.dtype) -> None:
    """A few small tiles go to clusters; the parts of an exact sum are exact, and copies of a token still tie."""
    generator = torch.Generator().manual_seed(channels)
    features = exact_features(generator, 1, 50, channels).repeat(2, 2, 1).to(dtype)
    got = sample(features, 60, first="isolated")
    launch = module.take_launches()[0]
    assert (launch["cluster"], launch["grid"][0]) == (parts, 2 * 3 * parts)
    same(got, reference.repulsion_sample(features.double(), 60, first="isolated"))
    module.settings().architecture = 80
    same(sample(features, 60, first="isolated"), got)
    assert module.take_launches()[0]["cluster"] == 1
    module.settings().architecture = 90
    noisy = torch.randn(1, 50, channels, generator=generator).repeat(1, 2, 1).to(dtype)
    picks = sample(noisy, 100)[0][0]
    assert (picks.argsort()[:50] < picks.argsort()[50:]).all()


def test_samples_wait_their_turn() -> None:
    """Two matrices of 50 tokens fit into the limit, so five samples are three groups."""
    limits(50, matrices=2 * 50 * 50 * 4)
    features, mask = torch.randn(5, 50, 24), torch.rand(5, 50) < 0.8
    options: dict[str, Any] = {"mask": mask, "positions": torch.rand(5, 50, 2), "potential": "riesz"}
    options |= {"seed_indices": torch.tensor([[3, -1], [-1, -1], [0, 49], [7, 7], [-1, -1]])}
    grouped = sample(features, 20, **options)
    assert kernels() == ["gram_kernel", "gram_rows_kernel", "gram_greedy_kernel"] * 3
    limits(50, matrices=1)
    same(sample(features, 20, **options), grouped)
    limits(50)
    same(sample(features, 20, **options), grouped)


@pytest.mark.parametrize(("channels", "way"), [(20, "points"), (70, "rounds")])
@pytest.mark.parametrize("first", ["index", "isolated"])
def test_more_tokens_than_a_matrix_has(channels: int, way: str, first: str) -> None:
    generator = torch.Generator().manual_seed(3)
    features = exact_features(generator, 1, module.GRAM_TOKEN_LIMIT + 28, channels).half()
    mask = torch.rand(1, features.shape[1], generator=generator) < 0.9
    got = sample(features, 40, mask=mask, first=first)
    launched = kernels()
    assert launched[-1] == f"{way}_kernel"
    assert len(launched) == (2 if first == "index" else 3)
    same(got, reference.repulsion_sample(features.double(), 40, mask=mask, first=first))


def test_farthest_points() -> None:
    """Positions alone: the tokens are points of five fields."""
    n = module.GRAM_TOKEN_LIMIT + 1000
    points = torch.randint(64, (1, n, 3), generator=torch.Generator().manual_seed(4)).float()
    options: dict[str, Any] = {"potential": "riesz", "feature_weight": 0.0, "first": "index", "epsilon": 1.0}
    module.settings().architecture = 80  # one block, of 1024 threads
    got = sample(torch.ones(1, n, 1), 24, positions=points, **options)
    launches = module.take_launches()
    assert [(entry["kernel"].split("<")[0], entry["grid"][0]) for entry in launches[1:]] == [("points_kernel", 1)]
    assert launches[1]["block"] == (1024, 1, 1)
    same(got, reference.repulsion_sample(torch.ones(1, n, 1).double(), 24, positions=points.double(), **options))


# --- the planner -----------------------------------------------------------------------------------------------------


@hypothesis_settings(deadline=None, max_examples=300, print_blob=True)
@given(
    batch=st.integers(0, 70000),
    n=st.one_of(st.integers(0, 65536), st.integers(3000, 3100), st.integers(0, 200)),
    channels=st.one_of(st.integers(0, 8192), st.integers(0, 70)),
    axes=st.integers(0, 3),
    k=st.integers(0, 70000),
    n_seeds=st.integers(0, 70000),
    first=st.integers(0, 2),
    energy=st.booleans(),
    total=st.booleans(),
    device=st.tuples(st.integers(1, 200), st.sampled_from([(99, 86), (163, 80), (227, 90)]), st.booleans()),
)
def test_plans(
    batch: int, n: int, channels: int, axes: int, k: int, n_seeds: int, first: int, energy: bool, total: bool,
    device: tuple[int, tuple[int, int], bool],
) -> None:  # fmt: skip
    limits = module.DeviceLimits()
    limits.sm_count, (kilobytes, limits.architecture), limits.cooperative = device
    limits.shared_per_block = kilobytes * 1024
    plan = module.plan_repulsion(batch, n, channels, axes, k, n_seeds, first, energy, total, limits)
    assert 0 <= plan.samples <= batch
    assert (plan.samples == 0) == (batch == 0)
    assert plan.greedy_block % 32 == 0
    assert 32 <= plan.greedy_block <= 1024
    assert plan.tile in (64, 128)
    ways = module.RepulsionAlgorithm
    if n == 0 or k == 0:
        assert plan.algorithm == ways.matrix
        assert not plan.start
        assert plan.floats == plan.words == 0
        assert plan.samples <= LARGEST_GRID
        return
    assert (plan.algorithm == ways.matrix) == (n <= 3072)
    assert plan.start == (not energy and first != 2)
    pairs = -(-n // 128)
    grids = [plan.samples]
    if plan.algorithm == ways.matrix:
        assert plan.samples * n * n * 4 <= 2**28 or plan.samples == 1
        assert plan.floats == plan.samples * (n * n + 2 * n) + 384
        assert plan.words == 0
        assert 8 * plan.greedy_block >= n  # the tokens of a thread are in eight registers
        side = -(-n // plan.tile)
        tiles = plan.samples * side * (side + 1) // 2
        assert plan.parts in (1, 2, 4, 8)
        if plan.parts > 1:
            assert limits.architecture >= 90
            assert channels >= 128 * plan.parts
            # In units of a whole tile: what the device takes for all of them, two blocks of a multiprocessor at a time.
            places = 2 * limits.sm_count
            assert -(-plan.parts * tiles // places) / plan.parts <= 0.8 * -(-tiles // places)
        grids += [tiles * plan.parts, plan.samples * -(-n // 8)]
        assert plan.tile == 64 or plan.samples * pairs * (pairs + 1) // 2 >= 2 * limits.sm_count
    else:
        points, rows = plan.algorithm == ways.points, 0
        direction = 33 * channels if plan.start and first == 0 else 0
        if points:
            assert plan.fields == channels + axes + 1 <= 64
            assert plan.cluster == (8 if limits.architecture >= 90 else 1)
            assert plan.cluster * plan.share >= n
            assert plan.share <= 32 * plan.greedy_block  # a bit for every token of a thread
            assert plan.greedy_shared == 4 * (plan.fields * (plan.share + 16) + plan.share)
            assert plan.greedy_shared <= limits.shared_per_block - 12 * 1024
            grids.append(plan.samples * plan.cluster)
        else:
            assert plan.fields == 0
            rows = 64 * n if total else 0
        assert plan.floats == plan.samples * n * (2 + plan.fields) + plan.groups * (direction + rows)
        assert plan.words == plan.samples * (2 * n + 5) + plan.groups * (64 + 2)
        assert plan.groups * rows * 4 <= 2**28 or plan.groups == 1
        # Every round but those of seeds makes a pick while there is one to make.
        assert plan.rounds == min(k, n) + -(-min(n_seeds, n) // 64)
        # All blocks of a cooperative launch are on the device at the same time.
        assert plan.groups <= plan.samples
        assert plan.groups * plan.group_blocks <= limits.sm_count * (2 if kilobytes >= 128 else 1)
        assert (plan.groups == 0) == (batch == 0)
        assert 1 <= plan.group_blocks <= (-(-n // 64) if limits.cooperative else 1)
        grids.append(plan.samples * -(-n // 8))
        if first == 1:
            grids.append(plan.samples * pairs * (pairs + 1) // 2)
    assert max(grids) <= LARGEST_GRID
