"""dpp_sample on the CUDA emulator: both algorithms on the same inputs, launches, layouts, schedules, planner."""

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
from testing.cases import DTYPES, NO_EMULATOR
from tests.ops import test_dpp as common
from tests.ops.test_repulsion import exact_features

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
GPU_DTYPES = DTYPES[:3]
ROWS = "dpp.matrix=0"  # small inputs go the way of large ones
every_way = pytest.mark.parametrize("way", ["", ROWS], ids=["matrix", "rows"])


@pytest.fixture(autouse=True)
def _no_overrides() -> Iterator[None]:
    yield
    module.set_plan("")


def sample(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    indices, gains, counts = tp.dpp_sample(*args, **options, backend="emulator")
    return indices, gains, counts


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


def kernels() -> list[str]:
    return [launch["kernel"].split("<")[0] for launch in module.take_launches()]


# --- the promises of tests/ops/test_dpp.py, for small inputs the way of large ones -----------------------------------


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_the_promises_without_a_matrix(dtype: torch.dtype) -> None:
    module.set_plan(ROWS)
    common.test_gains_multiply_to_the_determinant("emulator", dtype)
    common.test_features_that_are_not_finite_come_last("emulator", dtype)
    common.test_equal_tokens_tie("emulator", dtype, 72)
    common.test_replay("emulator", dtype, True)


def test_more_promises_without_a_matrix() -> None:
    module.set_plan(ROWS)
    common.test_qualities_of_every_kind("emulator")
    common.test_beyond_the_rank_quality_decides_and_nothing_changes("emulator")
    common.test_a_masked_token_is_as_if_it_were_not_there("emulator")
    common.test_more_picks_than_the_rank("emulator", 7)


@hypothesis_settings(deadline=None, max_examples=10, print_blob=True)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 90), channels=st.sampled_from([1, 5, 16, 72]))
def test_both_ways_agree_with_the_contract(seed: int, n: int, channels: int) -> None:
    """Qualities fall by powers of two, so that no rounding changes a pick while the kernel has rank left."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, n, channels, generator=generator)
    quality = 2.0 ** -torch.stack([torch.randperm(n, generator=generator) for _ in range(2)]).clamp_max(60).float()
    mask, k = torch.rand(2, n, generator=generator) < 0.8, min(n, channels)
    want = tp.reference.dpp_sample(features.double(), k, quality=quality, mask=mask)
    for way in ("", "dpp.cluster=2", ROWS):
        module.set_plan(way)
        got = sample(features, k, quality=quality, mask=mask)
        assert torch.equal(got[2], want[2])
        for b in range(2):
            own = quality[b][want[0][b].clamp_min(0)].double().square()
            solid = int((want[1][b] > 1e-3 * own).long().cumprod(0).sum())
            assert torch.equal(got[0][b, :solid], want[0][b, :solid])
            torch.testing.assert_close(got[1][b, :solid].double(), want[1][b, :solid], rtol=1e-2, atol=0)


# --- what is launched ------------------------------------------------------------------------------------------------


def test_launches() -> None:
    features = torch.randn(2, 70, 24)
    sample(features, 9)
    assert kernels() == ["gram_kernel", "dpp_matrix_kernel"]
    sample(features, 0)
    assert kernels() == ["dpp_matrix_kernel"]
    sample(features[:, :0], 9)
    assert kernels() == ["dpp_matrix_kernel"]
    sample(features[:0], 9)
    assert kernels() == []
    module.set_plan(ROWS)
    sample(features, 9)
    assert kernels() == ["dpp_prepare_kernel", "dpp_rows_kernel"]


def test_how_many_blocks_share_a_sample_does_not_matter() -> None:
    features, quality = torch.randn(2, 130, 96), torch.rand(2, 130) + 0.5
    want = sample(features, 60, quality=quality)
    roomy = module.take_launches()[-1]["shared"]
    for blocks in (1, 2, 4):
        module.set_plan(f"dpp.cluster={blocks}")
        same(sample(features, 60, quality=quality), want)
        assert module.take_launches()[-1]["cluster"] == blocks
    module.settings().architecture = 80
    module.set_plan("")
    got = sample(features, 60, quality=quality)
    launch = module.take_launches()[-1]
    assert launch["cluster"] == 1
    assert launch["shared"] > roomy
    assert torch.equal(got[0], want[0])


def test_rows_of_the_factor_in_device_memory() -> None:
    """One block of 300 tokens: 58 KB hold 40 of the 80 rows, and the rest is elsewhere."""
    features = torch.randn(1, 300, 96)
    module.set_plan("dpp.cluster=1")
    want = sample(features, 80)
    module.settings().shared_per_block = 58 * 1024
    plan = plan_of(batch=1, n=300, channels=96, k=80, shared=58 * 1024, architecture=80)
    assert 0 < plan.shared_rows < 80
    same(sample(features, 80), want)


def test_samples_wait_their_turn() -> None:
    """Two matrices of 50 tokens fit into the limit, so five samples are three groups."""
    usual = module.GRAM_TOKEN_LIMIT, module.GRAM_BYTE_LIMIT, module.POINT_FIELD_LIMIT, module.ROUND_LIMIT
    features, mask, quality = torch.randn(5, 50, 24), torch.rand(5, 50) < 0.8, torch.rand(5, 50)
    want = sample(features, 20, mask=mask, quality=quality)
    module.take_launches()
    module.set_repulsion_limits(usual[0], 2 * 50 * 50 * 4, usual[2], usual[3])
    try:
        same(sample(features, 20, mask=mask, quality=quality), want)
        assert kernels() == ["gram_kernel", "dpp_matrix_kernel"] * 3
    finally:
        module.set_repulsion_limits(*usual)


@pytest.mark.parametrize(
    ("batch", "sm_count", "grid"), [(1, 132, 5), (3, 132, 15), (3, 1, 2), (5, 2, 4)],
    ids=["one sample", "a group per sample", "groups of one block", "groups with two samples"],
)  # fmt: skip
def test_groups_of_blocks(batch: int, sm_count: int, grid: int) -> None:
    """70 tokens are five blocks of 16."""
    module.set_plan(ROWS)
    features, mask = torch.randn(batch, 70, 24), torch.rand(batch, 70) < 0.8
    want = sample(features, 20, mask=mask)
    module.settings().sm_count = sm_count
    module.take_launches()
    same(sample(features, 20, mask=mask), want)
    launch = module.take_launches()[-1]
    assert (launch["grid"][0], launch["cooperative"]) == (grid, grid > batch)


def test_a_device_whose_blocks_cannot_wait_for_each_other() -> None:
    module.set_plan(ROWS)
    features = torch.randn(2, 150, 24)
    want = sample(features, 24)
    module.settings().cooperative = False
    module.take_launches()
    same(sample(features, 24), want)
    launch = module.take_launches()[-1]
    assert (launch["grid"][0], launch["cooperative"]) == (2, False)


# --- layouts, schedules, errors --------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [0, 5, 32, 71])
def test_any_alignment(channels: int, dtype: torch.dtype, way: str) -> None:
    """Rows at odd addresses and of odd lengths, beside memory that must not enter."""
    module.set_plan(way)
    wanted = exact_features(torch.Generator().manual_seed(channels), 2, 66, channels).to(dtype)
    quality = 2.0 ** -torch.arange(66).expand(2, 66).float().clamp_max(40)
    want = sample(wanted, 6, quality=quality)
    for offset, width in ((0, channels), (1, channels + 3), (8, channels + 24 - channels % 8)):
        memory = torch.full((2, 70, width + offset), torch.nan, dtype=dtype)
        view = memory[:, 2:68, offset : offset + channels]
        view.copy_(wanted)
        got = sample(view, 6, quality=quality)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-9)
    same(sample(wanted.mT.contiguous().mT, 6, quality=quality), want)
    same(sample(wanted[:1].expand(2, -1, -1), 6, quality=quality), tuple(t[[0, 0]] for t in want))


@every_way
def test_the_order_of_threads_does_not_matter(way: str) -> None:
    module.set_plan(way)
    features, mask, quality = torch.randn(2, 150, 72).half(), torch.rand(2, 150) < 0.9, torch.rand(2, 150)
    results = []
    for schedule, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)):
        module.settings().schedule = getattr(module.Schedule, schedule)
        module.settings().seed = seed
        results.append(sample(features, 90, mask=mask, quality=quality))  # beyond the rank
    for other in results[1:]:
        same(other, results[0])


@every_way
def test_a_refused_launch_is_reported(way: str) -> None:
    module.set_plan(way)
    features = torch.randn(1, 40, 8)
    sample(features, 2)
    count = len(module.take_launches())
    for n in range(1, count + 1):
        module.settings().fail_launch = n
        with pytest.raises(RuntimeError, match=r"tokenprune::dpp_sample: CUDA error .* features \[1, 40, 8\]"):
            sample(features, 2)
        assert len(module.take_launches()) == n - 1
    module.settings().fail_launch = 0


# --- the planner -----------------------------------------------------------------------------------------------------


def device(architecture: int = 90, shared: int = 227 * 1024, sm_count: int = 132) -> Any:
    limits = module.DeviceLimits()
    limits.architecture, limits.shared_per_block, limits.sm_count = architecture, shared, sm_count
    return limits


def plan_of(batch: int, n: int, channels: int, k: int, **limits: int) -> Any:
    return module.plan_dpp(batch, n, channels, k, device(**limits))


def test_both_sides_of_the_threshold() -> None:
    assert plan_of(1, 3072, 4096, 320).matrix
    assert not plan_of(1, 3073, 4096, 320).matrix


def test_llava_fits_into_the_shared_memory_of_a_cluster() -> None:
    plan = plan_of(1, 576, 1024, 128)
    assert (plan.cluster, plan.share, plan.block, plan.shared_rows, plan.factor_floats) == (8, 72, 288, 128, 0)
    plan = plan_of(1, 2880, 4096, 320)
    assert (plan.cluster, plan.share) == (8, 360)
    assert 100 < plan.shared_rows < 320
    assert plan.factor_floats == (320 - plan.shared_rows) * 8 * plan.pitch


@hypothesis_settings(deadline=None, max_examples=200)
@given(
    batch=st.integers(0, 300), n=st.integers(0, 70000), k=st.integers(0, 5000), architecture=st.sampled_from([80, 90]),
    shared=st.sampled_from([99, 163, 227]), sm_count=st.sampled_from([1, 40, 132]),
)  # fmt: skip
def test_plans_fit_the_device(batch: int, n: int, k: int, architecture: int, shared: int, sm_count: int) -> None:
    plan = plan_of(batch, n, 64, k, architecture=architecture, shared=shared * 1024, sm_count=sm_count)
    assert plan.samples <= batch
    assert plan.floats >= 0
    assert plan.words >= 0
    if n == 0 or k == 0 or batch == 0:
        return
    assert plan.samples > 0
    if not plan.matrix:
        assert 1 <= plan.groups <= plan.samples
        assert plan.groups * plan.group_blocks <= 2 * sm_count
        assert plan.factor_floats == plan.groups * n * min(n, k)
        return
    assert plan.shared <= shared * 1024 - 1024
    assert plan.cluster * plan.share >= n
    assert plan.cluster == (8 if architecture >= 90 else 1)
    assert plan.pitch % 32 == 8
    assert plan.block <= 768
    assert plan.block % 32 == 0
    assert -(-plan.share // (plan.block // 4)) <= 32  # a bit for each of a thread's tokens
    assert plan.shared_rows % 4 == 0
