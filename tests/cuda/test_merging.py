"""merge_tokens on the CUDA emulator: clusters, alignment, many tiles, overflow, rounds of the lists, the planner."""

import pytest
import torch

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR, dtypes_of
from testing.op_inputs import features
from tests.ops.test_merging import check, kept

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
DTYPES = dtypes_of("emulator")
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d).removeprefix("torch.") for d in DTYPES])
over_metrics = pytest.mark.parametrize("metric", ["cosine", "euclidean"])


def limits(architecture: int = 90, multiprocessors: int = 132):
    limits = module.DeviceLimits()
    limits.architecture, limits.sm_count = architecture, multiprocessors
    return limits


@over_dtypes
@over_metrics
def test_clusters_decide_as_a_block_alone_does(dtype: torch.dtype, metric: str) -> None:
    """Targets in two tiles, of which the second is not full, and channels in 1 to 8 parts."""
    keys, values, targets = features(1, 150, 1030, dtype=dtype, seed=2), torch.randn(1, 150, 5), kept(1, 150, 70)
    for multiprocessors, cluster in ((1, 1), (6, 4), (132, 8)):
        module.settings().sm_count = multiprocessors
        module.take_launches()
        check("emulator", values, targets, keys=keys, metric=metric)
        assert [launch["cluster"] for launch in module.take_launches()] == [1, cluster, 1]
    module.settings().architecture = 80
    check("emulator", values, targets, keys=keys, metric=metric)
    assert [launch["cluster"] for launch in module.take_launches()] == [1, 1, 1]


@over_dtypes
@pytest.mark.parametrize("channels", [64, 60, 3])
def test_rows_off_16_bytes_give_the_same_bits(dtype: torch.dtype, channels: int) -> None:
    values, targets = torch.randn(2, 70, channels).to(dtype), kept(2, 70, 9)
    want = tp.merge_tokens(values, targets, backend="emulator")
    padded = torch.zeros(2, 70, channels + 1, dtype=dtype)
    padded[..., 1:] = values
    turned = values.mT.contiguous().mT  # channels are not neighbours
    for same in (padded[..., 1:], turned):
        got = tp.merge_tokens(same, targets, backend="emulator")
        assert all(map(torch.equal, got, want))


@over_metrics
def test_the_same_key_in_several_tiles_of_targets_goes_to_the_lowest_slot(metric: str) -> None:
    keys = torch.randn(1, 3, 40)[:, torch.randint(0, 3, (200,))]
    keys[:, ::2] *= 1e-3  # other norms, too
    targets = torch.randperm(200)[None, :140]
    joined = tp.merge_tokens(keys, targets, metric=metric, backend="emulator")[2]
    for i in set(range(200)) - set(targets[0].tolist()):
        twins = [
            c for c in range(140) if torch.equal(keys[0, targets[0, c]], keys[0, joined_key(keys, targets, joined, i)])
        ]
        assert joined[0, i] == min(twins)


def joined_key(keys: torch.Tensor, targets: torch.Tensor, joined: torch.Tensor, i: int) -> int:
    return int(targets[0, joined[0, i]])


@pytest.mark.parametrize("n", [511, 512, 513, 1100])
def test_sums_ascend_over_all_rounds_of_the_list(n: int) -> None:
    """A large number first: float32 sums in any other order give another result."""
    values = torch.rand(1, n, 3)
    values[0, 0] = 3e7
    joined = torch.randint(-1, 2, (1, n))
    joined[0, 0], weights = 0, torch.rand(1, n)
    merged, sizes, _ = tp.merge_tokens(
        values, torch.zeros(1, 2, dtype=torch.int64) - 1, assignment=joined, weights=weights, backend="emulator"
    )
    for slot in range(2):
        total, size = torch.zeros(3), torch.zeros(())
        for i in (joined[0] == slot).nonzero().flatten().tolist():
            total, size = (
                (weights[0, i].double() * values[0, i].double() + total.double()).float(),
                size + weights[0, i],
            )
        assert torch.equal(sizes[0, slot], size)
        assert torch.equal(merged[0, slot], total / size)


@over_dtypes
def test_values_of_many_slices(dtype: torch.dtype) -> None:
    """More channels than a block has: 1024 of 16 bits, 512 of 32."""
    values = torch.randn(1, 20, 2100).to(dtype)
    check("emulator", values, kept(1, 20, 3), assignment=torch.randint(-1, 3, (1, 20)))
    for channels, slices in ((1024, 1), (1025, 2), (2048, 2), (2049, 3)):
        assert module.mean_slices(channels, 2) == module.mean_slices(channels // 2 + channels % 2, 4) == slices


def test_a_sum_that_overflows_is_compared_by_differences() -> None:
    keys = torch.full((1, 70, 8), 3e19)
    keys[0, :, 0] = torch.arange(70) * 1e15
    targets = torch.tensor([[10, 40]])
    joined = tp.merge_tokens(keys, targets, metric="euclidean", backend="emulator")[2]
    gap = (keys[0, :, :1] - keys[0, targets[0], 0]).abs()
    assert torch.equal(joined[0], gap.argmin(-1))


def test_planner_shares_channels_while_the_device_is_idle() -> None:
    plan = module.plan_assign
    assert [plan(1, 64, c, limits()).parts for c in (255, 256, 511, 512, 1024, 9999)] == [1, 2, 2, 4, 8, 8]
    assert plan(1, 64, 9999, limits(architecture=80)).parts == 1
    for tiles, parts in ((33, 8), (34, 4), (66, 4), (67, 2), (132, 2), (133, 1)):
        assert plan(1, 64 * tiles, 1024, limits()).parts == plan(tiles, 1, 1024, limits()).parts == parts
    assert (plan(2, 65, 8, limits()).tiles, plan(2, 65, 8, limits()).norm_blocks) == (4, 33)
