"""spatial_semantic_nms on the CUDA emulator: launches, every plan on small inputs, schedules, and the planner."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import DTYPES, NO_EMULATOR

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
INF = math.inf
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # FloatType in nms.h
over_types = pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)


def inputs(batch: int, n: int, channels: int, dtype: torch.dtype, side: int = 7) -> dict[str, Tensor]:
    """Scores of either sign, features in bundles, positions on a small grid in no order, two groups, a few masked."""
    bundles = torch.randn(batch, 1 + n // 6, channels)
    features = bundles[:, torch.randint(0, 1 + n // 6, (n,))] + 0.1 * torch.randn(batch, n, channels)
    return {
        "scores": (torch.randn(batch, n) + 1).to(dtype),
        "features": features.to(dtype),
        "positions": torch.randint(0, side, (batch, n, 2)).to(dtype),
        "groups": (torch.rand(batch, n) < 0.3).long(),
        "mask": torch.rand(batch, n) < 0.9,
    }


def nms(given: dict[str, Tensor], k: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tp.spatial_semantic_nms(**given, k=k, backend="emulator", **options)


def kernels() -> list[str]:
    return [launch["kernel"].split("<")[0] for launch in module.take_launches()]


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32))
    assert torch.equal(got[2], want[2])


# --- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0, ["nms_select_kernel"]),
        (1, ["nms_prepare_kernel", "nms_select_kernel"]),
        (2, ["nms_prepare_kernel", "nms_select_kernel"]),
        (3, ["nms_prepare_kernel", "nms_weights_kernel", "nms_select_kernel"]),
        (50, ["nms_prepare_kernel", "nms_weights_kernel", "nms_select_kernel"]),
    ],
)
def test_the_number_of_launches_does_not_depend_on_k(k: int, expected: list[str]) -> None:
    nms(inputs(2, 40, 8, torch.float16), k)
    assert kernels() == expected


def test_lists_where_there_are_no_clusters() -> None:
    given = inputs(2, 150, 40, torch.float16, side=12)
    want = nms(given, 40)
    assert kernels() == ["nms_prepare_kernel", "nms_weights_kernel", "nms_select_kernel"]
    module.settings().architecture = 80
    assert_same_bits(nms(given, 40), want)
    assert kernels() == ["nms_prepare_kernel", "nms_lists_kernel", "nms_select_kernel"]


def test_launches_overlap_where_the_device_lets_them() -> None:
    for architecture, k, expected in [(90, 9, [False, True, True]), (90, 2, [False, True]), (90, 0, [False]),
                                      (80, 9, [False] * 3)]:  # fmt: skip
        module.settings().architecture = architecture
        nms(inputs(1, 40, 8, torch.float16), k)
        assert [launch["dependent"] for launch in module.take_launches()] == expected


def test_padding_is_written_without_tokens() -> None:
    indices, selected, counts = nms(inputs(2, 0, 8, torch.float32), 3)
    assert kernels() == ["nms_select_kernel"]
    assert indices.tolist() == [[-1] * 3] * 2
    assert selected.tolist() == [[0.0] * 3] * 2
    assert counts.tolist() == [0, 0]


@pytest.mark.parametrize("launch", [1, 2, 3])
def test_a_failed_launch_is_reported(launch: int) -> None:
    module.settings().fail_launch = launch
    with pytest.raises(RuntimeError, match=r"spatial_semantic_nms: CUDA error .* features \[1, 40, 8\] float16"):
        nms(inputs(1, 40, 8, torch.float16), 9)
    nms(inputs(1, 40, 8, torch.float16), 9)


def test_too_many_tokens_are_refused() -> None:
    n = 2**30 + 1
    scores = torch.zeros(1, 1).expand(1, n)
    with pytest.raises(RuntimeError, match=r"at most 2\^30 tokens"):
        tp.spatial_semantic_nms(
            scores, torch.zeros(1, 1, 1).expand(1, n, 1), torch.zeros(1, 1, 2).expand(1, n, 2), 1, backend="emulator"
        )


def test_long_samples_get_a_cluster_where_there_are_clusters() -> None:
    given = inputs(1, 600, 8, torch.float16, side=40)
    want = nms(given, 2)
    assert module.take_launches()[-1]["cluster"] == 2
    module.settings().architecture = 80
    assert_same_bits(nms(given, 2), want)
    assert module.take_launches()[-1]["cluster"] == 1


def test_keys_that_do_not_fit_into_shared_memory_stay_in_global_memory() -> None:
    given = inputs(1, 60, 8, torch.float16)
    want = nms(given, 30)
    assert module.take_launches()[-1]["shared"] == 240
    module.settings().shared_per_block = module.NMS_SELECT_STATIC
    assert_same_bits(nms(given, 30), want)
    assert module.take_launches()[-1]["shared"] == 0


@over_types
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 129, 200, 257])
def test_a_table_of_any_number_of_tiles(dtype: torch.dtype, n: int) -> None:
    """Every pair of tiles is there once, at whatever edge; with groups far apart some pairs have no neighbours."""
    for side in (3, 60):
        given = inputs(2, n, 40, dtype, side=side)
        given["groups"] = torch.arange(n).expand(2, n) // 70
        got = nms(given, n + 3, sigma_semantic=0.5)
        assert kernels().count("nms_weights_kernel") == (n > 2)
        assert_same_bits(run_plan(given, n + 3, {}, sigma_semantic=0.5), got)
        module.take_launches()


# --- every plan gives the same bits ---------------------------------------------------------------------------------


def run_plan(given: dict[str, Tensor], k: int, changes: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    """The launcher with a plan that differs from the planner's, which makes lists for devices without clusters."""
    batch, n, dim = given["features"].shape
    dtype = given["features"].dtype
    radius, spatial = options.get("radius", 5.0), options.get("sigma_spatial", 1.5)
    by = module.NmsSuppression(
        radius, spatial, options.get("sigma_semantic", 0.05), options.get("threshold", 0.5),
        options.get("mode", "soft") == "hard",
    )  # fmt: skip
    plan = module.plan_nms(batch, n, dim, dtype.itemsize, k, min(radius, 6 * spatial), limits(132, 163 * 1024, 80))
    for name, value in changes.items():
        setattr(plan, name, value)
    plan.owned = -(-n // plan.cluster)
    plan.shared = 4 * plan.owned if plan.keys_in_shared else 0
    if plan.weight_blocks:
        plan.capacity = 0
    plan.list_blocks = plan.list_blocks if plan.capacity else 0
    units = batch * n * 2 + (-(-batch * n * n // 2) if plan.weight_blocks else batch * n * plan.capacity)
    workspace = torch.full((units,), 0x5A5A5A5A5A5A5A5A)
    indices, counts = torch.full((batch, k), -9), torch.full((batch,), -9)
    selected = torch.full((batch, k), math.nan)
    status = module.run_nms(
        module.NmsInputs(
            TYPES[dtype], *(given[name].data_ptr() for name in ("scores", "features", "positions", "groups", "mask")),
            batch, n, dim, k,
        ),
        by, plan, module.NmsOutputs(*(t.data_ptr() for t in (workspace, indices, selected, counts))),
    )  # fmt: skip
    assert status == 0
    return indices, selected, counts


PLANS = {
    "lists": {},
    "no lists": {"capacity": 0},
    "nearly every list overflows": {"capacity": 1},
    "some lists overflow": {"capacity": 24},
    "a cluster of two without lists": {"capacity": 0, "cluster": 2},
    "a cluster of eight, some lists overflow": {"capacity": 24, "cluster": 8},
    "keys in global memory": {"keys_in_shared": False},
    "a cluster, keys in global memory": {"cluster": 4, "keys_in_shared": False, "capacity": 24},
    "one block does all the tiles": {"prepare_blocks": 1, "list_blocks": 1},
    "one split": {"splits": 1, "split_columns": 128, "list_blocks": 16},
    "more threads than tokens": {"select_threads": 384},
    "more threads than tokens, no lists": {"select_threads": 384, "capacity": 0},
}


@pytest.mark.parametrize("plan", PLANS)
@over_types
def test_every_plan_gives_the_same_bits(dtype: torch.dtype, plan: str) -> None:
    # 70 channels: rows are not aligned; 136: aligned, and segments that end within a step; 544: whole chunks.
    for channels, options in [
        (70, {}),
        (136, {"mode": "hard", "threshold": 0.2, "sigma_semantic": 0.5}),
        (544, {"radius": INF, "sigma_spatial": 3.0, "sigma_semantic": 0.3}),
        (16, {"radius": INF, "sigma_spatial": INF, "sigma_semantic": INF}),
    ]:
        given = inputs(2, 100, channels, dtype)
        want = nms(given, 12, **options)
        assert_same_bits(run_plan(given, 12, PLANS[plan], **options), want)


@over_types
def test_equal_rows_are_suppressed_equally(dtype: torch.dtype) -> None:
    """Twins (equal features, position and score) stay equal to the last bit, so that the lower one is picked first."""
    given = inputs(1, 40, 77, dtype)
    twins = {name: torch.cat([t, t], 1) for name, t in given.items()}
    for changes in ({}, {"capacity": 0}, {"capacity": 30}):
        indices, _, counts = run_plan(twins, 80, changes, sigma_semantic=0.4)
        assert counts[0] == 2 * given["mask"].sum()
        steps = {token: step for step, token in enumerate(indices[0, : counts[0]].tolist())}
        assert all(steps[token] < steps[token + 40] for token in steps if token < 40)


def test_a_list_may_be_exactly_full() -> None:
    n = 34
    given = inputs(1, n, 8, torch.float32, side=1)
    given["groups"].zero_()
    given["mask"].fill_(True)
    want = nms(given, n)
    for capacity in (n - 2, n - 1, n):
        assert_same_bits(run_plan(given, n, {"capacity": capacity}), want)


def test_lists_longer_than_a_block_of_threads() -> None:
    given = inputs(1, 300, 4, torch.float32, side=5)
    options = {"sigma_semantic": 0.6}
    want = run_plan(given, 5, {"select_threads": 384}, **options)
    assert_same_bits(run_plan(given, 5, {"select_threads": 128}, **options), want)
    expected = tp.reference.spatial_semantic_nms(
        **{n: t.double() if t.is_floating_point() else t for n, t in given.items()}, k=5, **options
    )
    assert torch.equal(want[0], expected[0])


@over_types
@pytest.mark.parametrize("schedule", ["reversed", "shuffled"])
def test_schedules_do_not_matter(dtype: torch.dtype, schedule: str) -> None:
    given = inputs(2, 90, 40, dtype)
    changes = ({}, {"capacity": 0}, {"capacity": 20, "cluster": 2})
    want = [run_plan(given, 10, change) for change in changes]
    table = nms(given, 10)
    for seed in (1, 2):
        module.settings().schedule = getattr(module.Schedule, schedule)
        module.settings().seed = seed
        for change, result in zip(changes, want, strict=True):
            assert_same_bits(run_plan(given, 10, change), result)
        assert_same_bits(nms(given, 10), table)


def test_the_real_plan_of_a_dense_sample_overflows() -> None:
    """Everything is near everything, and the lists have no room for that: as the same tokens among fewer others, of
    which there is a table."""
    n, hidden = 2100, 200
    given = inputs(1, n, 2, torch.float32)
    given["groups"].zero_()
    given["groups"][:, 2060:] = 1 + torch.arange(40) // 4  # small groups, whose lists have room
    given["scores"][:, 2060:] += 2
    given["mask"] = (torch.arange(n) >= hidden).unsqueeze(0)
    shorter = {name: t[:, hidden:].contiguous() for name, t in given.items()}
    options = {"radius": INF, "sigma_spatial": INF, "sigma_semantic": 1.0}
    plan = module.plan_nms(1, n, 2, 4, 4, INF, module.DeviceLimits())
    assert 0 < plan.capacity < 2060 - hidden - 1  # what a token of group 0 reaches
    assert plan.cluster == 8
    assert module.plan_nms(1, n - hidden, 2, 4, 4, INF, module.DeviceLimits()).weight_blocks > 0
    want, got = nms(shorter, 4, **options), nms(given, 4, **options)
    assert set(given["groups"][0, got[0][0]].tolist()) > {0}  # picks with a list and without one
    assert torch.equal(got[0], want[0] + hidden)
    assert torch.equal(got[1], want[1])


# --- the planner ----------------------------------------------------------------------------------------------------


def limits(sm_count: int, shared: int, architecture: int) -> Any:
    result = module.DeviceLimits() if module else None
    result.sm_count, result.shared_per_block, result.architecture = sm_count, shared, architecture
    return result


@settings(deadline=None, max_examples=400, print_blob=True)
@given(
    st.one_of(st.integers(1, 64), st.integers(1, 2**20)),
    st.one_of(st.integers(1, 4096), st.integers(1, 65536), st.integers(1, 2**30)),
    st.integers(0, 8192), st.sampled_from([2, 4]), st.one_of(st.integers(0, 5), st.integers(0, 2**31)),
    st.sampled_from([0.0, 0.5, 5.0, 9.0, 100.0, INF]), st.integers(1, 200),
    st.sampled_from([48, 99, 163, 227]), st.sampled_from([80, 86, 89, 90, 100, 120]),
)  # fmt: skip
def test_plans_cover_the_work_within_the_limits(
    batch: int, n: int, dim: int, size: int, k: int, reach: float, sm_count: int, shared: int, architecture: int
) -> None:
    plan = module.plan_nms(batch, n, dim, size, k, reach, limits(sm_count, 1024 * shared, architecture))
    assert plan.steps == min(k, n)
    if plan.steps == 0:
        assert (plan.prepare_blocks, plan.list_blocks, plan.cluster, plan.shared, plan.workspace) == (0, 0, 1, 0, 0)
        return
    tokens = batch * n
    assert 0 < plan.prepare_blocks <= min(-(-tokens // 4), 2**31 - 1)
    assert 0 <= plan.capacity <= n - 1
    lists = 8 * plan.capacity * tokens
    assert lists <= max(
        module.NMS_ALWAYS_LIST_BYTES, min(8 * module.NMS_FEATURE_CAPACITY * tokens, tokens * dim * size)
    )
    table = 4 * n * tokens if plan.weight_blocks else 0
    assert table <= module.NMS_ALWAYS_LIST_BYTES
    assert plan.workspace == table + lists + 16 * tokens
    if plan.weight_blocks:
        tiles = -(-n // 64)
        assert plan.steps > 2
        assert architecture >= 90
        assert plan.capacity == 0
        assert plan.weight_blocks == 4 * batch * tiles * (tiles // 2 + 1) < 2**31
    if plan.capacity == 0:
        assert plan.list_blocks == 0
    else:
        assert plan.steps > 2
        assert plan.split_columns % module.NMS_COLUMN_TILE == 0
        assert (plan.splits - 1) * plan.split_columns < n <= plan.splits * plan.split_columns
        assert plan.splits * plan.split_columns < 2**31  # columns are counted in 32 bits
        assert 0 < plan.list_blocks <= min(batch * -(-n // module.NMS_ROW_TILE) * plan.splits, 2**31 - 1)
    assert plan.cluster in (1, 2, 4, 8)
    assert plan.cluster == 1 or (architecture >= 90 and plan.cluster * batch <= sm_count)
    assert plan.owned * plan.cluster >= n
    assert plan.owned * (plan.cluster - 1) < n
    assert plan.select_threads % 128 == 0
    assert 128 <= plan.select_threads <= 384
    assert plan.shared == (4 * plan.owned if plan.keys_in_shared else 0)
    assert plan.shared + module.NMS_SELECT_STATIC <= 1024 * shared


def test_the_usual_shapes_get_a_table_or_lists_for_their_whole_window() -> None:
    for batch, n, dim in [(1, 576, 4096), (8, 576, 4096), (1, 2880, 4096), (1, 16384, 3584), (1, 65536, 4096)]:
        plan = module.plan_nms(batch, n, dim, 2, n // 10, 5.0, limits(132, 227 * 1024, 90))
        assert (plan.weight_blocks > 0) == (n == 576)
        assert plan.weight_blocks or plan.capacity >= 80, (batch, n)
        assert plan.cluster == min(8, max(1, 2 ** int(math.log2(max(n // 4096, 1)))))


@settings(deadline=None, max_examples=300, print_blob=True)
@given(
    st.one_of(
        st.floats(0, INF, width=32), st.sampled_from([0.0, 1e-30, 1e-22, 2.0**-75, 1.0, 5.0, 1e19, 2e19, 1e30, INF])
    )
)
def test_the_squared_radius_is_the_radius(radius: float) -> None:
    limit = np.float32(module.largest_square_within(radius))
    assert np.sqrt(limit) <= np.float32(radius)
    with np.errstate(over="ignore"):  # what comes after the largest number
        assert limit == INF or np.sqrt(np.nextafter(limit, np.float32(INF))) > np.float32(radius)


def test_distances_at_the_radius_are_within_it() -> None:
    """Positions and radii that are not exact in float32: the same tokens are near as for the reference."""
    for scale, radius in itertools.product((24, 31, 100), (1, 2, 3, 5)):
        given = inputs(1, 81, 4, torch.float32)
        rows, columns = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
        given["positions"] = (torch.stack([rows, columns], -1).view(1, 81, 2) / scale).contiguous()
        options = {"mode": "hard", "threshold": -INF, "radius": radius / scale, "sigma_spatial": INF}
        got, want = nms(given, 81, **options), tp.reference.spatial_semantic_nms(**given, k=81, **options)
        assert torch.equal(got[0], want[0])
