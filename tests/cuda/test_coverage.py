"""coverage_sample on the CUDA emulator: launches, plans that must not change a bit, schedules, planner."""

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
from testing.cases import NO_EMULATOR

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None


@pytest.fixture(autouse=True)
def _no_overrides() -> Iterator[None]:
    yield
    module.set_plan("")
    module.set_coverage_limit(module.COVERAGE_BYTE_LIMIT)


def sample(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    indices, gains, counts = tp.coverage_sample(*args, **options, backend="emulator")
    return indices, gains, counts


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def kernels() -> list[str]:
    return [launch["kernel"].split("<")[0] for launch in module.take_launches()]


def case(batch: int, rows: int, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    similarity = torch.randn(batch, rows, n)
    return similarity, {
        "row_weights": torch.rand(batch, rows), "quality": torch.rand(batch, n),
        "row_mask": torch.rand(batch, rows) < 0.8, "mask": torch.rand(batch, n) < 0.8,
    }  # fmt: skip


def test_launches() -> None:
    similarity, options = case(2, 30, 70)
    sample(similarity, 9, **options)
    assert kernels() == ["coverage_columns_kernel", "coverage_greedy_kernel"]
    sample(similarity, 0)
    assert kernels() == ["coverage_greedy_kernel"]
    sample(similarity[:, :, :0], 9)
    assert kernels() == ["coverage_greedy_kernel"]
    sample(similarity[:, :0], 9)
    assert kernels() == ["coverage_greedy_kernel"]
    sample(similarity[:0], 9)
    assert kernels() == []


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 9), (64, 65), (150, 200), (200, 600)])
def test_the_plan_changes_no_bit(rows: int, n: int) -> None:
    """How many blocks share a sample, and where their state is."""
    similarity, options = case(2, rows, n)
    want = sample(similarity, min(n, 70), **options)
    for blocks in (1, 2, 4):
        module.set_plan(f"coverage.cluster={blocks}")
        module.take_launches()
        same(sample(similarity, min(n, 70), **options), want)
        assert module.take_launches()[-1]["cluster"] == blocks
    module.set_plan("")
    module.settings().shared_per_block = 5 * 1024  # less than what is static, and the state of these
    same(sample(similarity, min(n, 70), **options), want)
    if rows >= 150:
        assert module.take_launches()[-1]["shared"] == 0
    module.settings().architecture = 80
    same(sample(similarity, min(n, 70), **options), want)


def test_samples_wait_their_turn() -> None:
    """Columns of two samples fit into the limit, so five samples are three groups."""
    similarity, options = case(5, 32, 50)
    want = sample(similarity, 20, **options)
    module.take_launches()
    module.set_coverage_limit(2 * 4 * 32 * 50)
    same(sample(similarity, 20, **options), want)
    assert kernels() == ["coverage_columns_kernel", "coverage_greedy_kernel"] * 3


def test_the_order_of_threads_does_not_matter() -> None:
    similarity, options = case(2, 70, 150)
    results = []
    for schedule, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)):
        module.settings().schedule = getattr(module.Schedule, schedule)
        module.settings().seed = seed
        results.append(sample(similarity.half(), 90, **options))
    for other in results[1:]:
        same(other, results[0])


def test_a_tie_of_a_stale_gain_goes_to_the_lower_index() -> None:
    """After the pick of token 300, tokens 0 and 299 tie at 3; the bound of 299 was 4."""
    similarity = torch.zeros(1, 12, 301)
    similarity[0, :8, 300] = 1
    similarity[0, 7:11, 299] = 1
    similarity[0, 8:11, 0] = 1
    similarity[0, 11, 298] = 2.5
    indices, gains, _ = sample(similarity, 5)
    assert indices.tolist() == [[300, 0, 298, 1, 2]]
    assert gains.tolist() == [[8.0, 3.0, 2.5, 0.0, 0.0]]


def test_a_refused_launch_is_reported() -> None:
    similarity = torch.rand(1, 40, 8)
    for n in (1, 2):
        module.take_launches()
        module.settings().fail_launch = n
        with pytest.raises(RuntimeError, match=r"tokenprune::coverage_sample: CUDA error .* similarity \[1, 40, 8\]"):
            sample(similarity, 2)
        assert len(module.take_launches()) == n - 1
    module.settings().fail_launch = 0


# --- the planner -----------------------------------------------------------------------------------------------------


def plan_of(batch: int, rows: int, n: int, k: int, architecture: int = 90, shared: int = 227 * 1024) -> Any:
    limits = module.DeviceLimits()
    limits.architecture, limits.shared_per_block = architecture, shared
    return module.plan_coverage(batch, rows, n, k, limits)


def test_llava_has_a_cluster_with_its_state_in_shared_memory() -> None:
    plan = plan_of(1, 576, 576, 128)
    assert (plan.cluster, plan.block, plan.per_warp, plan.width) == (8, 512, 5, 576)
    assert plan.shared == 4 * (2 * 576 + 2 * 16 * 5)
    plan = plan_of(1, 2880, 2880, 320)
    assert (plan.cluster, plan.block, plan.per_warp) == (8, 512, 23)
    assert plan.shared == 4 * (2 * 2880 + 2 * 16 * 23)


def test_both_sides_of_the_state_in_shared_memory() -> None:
    room = 227 * 1024 - 4096
    rows = (room - 8 * 16) // 8 // 4 * 4  # one token for each of the 16 warps
    assert plan_of(1, rows, 128, 1).shared > 0
    assert plan_of(1, rows, 128, 1).state_floats == 0
    assert plan_of(1, rows + 1, 128, 1).shared == 0
    assert plan_of(1, rows + 1, 128, 1).state_floats > 0


@hypothesis_settings(deadline=None, max_examples=200)
@given(
    batch=st.integers(0, 300), rows=st.integers(0, 70000), n=st.integers(0, 70000), k=st.integers(0, 5000),
    architecture=st.sampled_from([80, 90]), shared=st.sampled_from([99, 163, 227]),
)  # fmt: skip
def test_plans_fit_the_device(batch: int, rows: int, n: int, k: int, architecture: int, shared: int) -> None:
    plan = plan_of(batch, rows, n, k, architecture, shared * 1024)
    assert plan.samples <= batch
    if n == 0 or k == 0 or batch == 0:
        return
    assert plan.samples > 0
    assert plan.samples == 1 or plan.column_floats * 4 <= module.COVERAGE_BYTE_LIMIT
    assert plan.width % 4 == 0
    assert rows <= plan.width < rows + 4
    assert plan.block % 32 == 0
    assert plan.block <= 512
    assert plan.cluster * plan.block // 32 * plan.per_warp >= n
    assert plan.shared <= shared * 1024 - 4096
    assert (plan.shared > 0) != (plan.state_floats > 0)
