"""density_peaks on the CUDA emulator: strips, samples in turn, clusters, alignment, the planner."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR, dtypes_of
from tests.ops.test_density import check, grid

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
DTYPES = dtypes_of("emulator")
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d).removeprefix("torch.") for d in DTYPES])


@pytest.fixture(autouse=True)
def usual_limit() -> Iterator[None]:
    yield
    if module is not None:
        module.set_density_byte_limit(module.DENSITY_BYTE_LIMIT)


def limits(architecture: int = 90, multiprocessors: int = 132):
    limits = module.DeviceLimits()
    limits.architecture, limits.sm_count = architecture, multiprocessors
    return limits


def names() -> list[str]:
    return [launch["kernel"].split("<")[0].removesuffix("_kernel") for launch in module.take_launches()]


def peaks(features: Tensor, **options) -> tuple[Tensor, ...]:
    return tp.density_peaks(features, 9, backend="emulator", **options)


@over_dtypes
def test_strips_give_the_same_bits_as_a_matrix(dtype: torch.dtype) -> None:
    """Of 200 tokens in strips of 128 and 72, or of 64 tokens and 8."""
    features, mask = torch.randn(2, 200, 70).to(dtype), torch.rand(2, 200) < 0.8
    module.settings().sm_count = 1  # the same parts of the channels, which are sums of their own
    module.take_launches()
    want = peaks(features, mask=mask)
    assert names() == ["density_products", "density_means", "density_distances", "select"]
    for rows, strips in ((128, 2), (1, 4)):
        module.set_density_byte_limit(4 * 200 * rows)
        assert all(map(torch.equal, peaks(features, mask=mask), want))
        each = [*["density_products", "density_means"] * strips, *["density_products", "density_distances"] * strips]
        assert names() == ["density_products", *each] * 2 + ["select"]


def test_samples_that_do_not_fit_together_take_turns() -> None:
    features = grid(5, 70, 9, torch.float32)
    want = peaks(features)
    module.set_density_byte_limit(4 * 70 * 70 * 2)
    module.take_launches()
    assert all(map(torch.equal, peaks(features), want))
    assert names() == [*["density_products", "density_means", "density_distances"] * 3, "select"]


@over_dtypes
def test_clusters_find_the_same(dtype: torch.dtype) -> None:
    features = grid(1, 150, 1030, dtype)
    doubled = torch.cat([torch.randn(1, 50, 1030).to(dtype)] * 2, 1)
    for multiprocessors, cluster in ((3, 1), (12, 4), (132, 8)):
        module.settings().sm_count = multiprocessors
        module.take_launches()
        check("emulator", features, 12)
        assert [launch["cluster"] for launch in module.take_launches()] == [cluster, 1, 1, 1]
        assert peaks(doubled, neighbors=2)[2].eq(1).all()
    module.settings().architecture = 80
    check("emulator", features, 12)
    assert peaks(doubled, neighbors=2)[2].eq(1).all()


@over_dtypes
@pytest.mark.parametrize("channels", [64, 60, 3])
def test_rows_off_16_bytes_give_the_same_bits(dtype: torch.dtype, channels: int) -> None:
    features = torch.randn(2, 70, channels).to(dtype)
    padded = torch.zeros(2, 70, channels + 1, dtype=dtype)
    padded[..., 1:] = features
    for same in (padded[..., 1:], features.mT.contiguous().mT):
        assert all(map(torch.equal, peaks(same), peaks(features)))


def test_planner_stores_products_up_to_the_limit() -> None:
    plan = module.plan_density
    assert module.DENSITY_BYTE_LIMIT == 256 << 20
    stored, long = plan(3, 8192, 64, limits()), plan(3, 8193, 64, limits())
    assert (stored.strips, stored.rows, stored.samples) == (False, 8192, 1)
    assert (long.strips, long.rows, long.samples) == (True, 8128, 1)
    assert plan(99, 4096, 64, limits()).samples == 4
    assert plan(3, 4096, 64, limits()).samples == 3
    assert plan(1, 2**30, 64, limits()).rows == 64  # more than the limit
    for n in (64, 4096, 8193, 200_000, 1_000_000):
        assert plan(2, n, 64, limits()).floats <= (256 << 20) / 4 + 6 * n + (n % 64 > 0) * 64 * n


def test_planner_shares_channels_while_the_device_is_idle() -> None:
    plan = module.plan_density
    assert [plan(1, 64, c, limits()).parts for c in (255, 256, 511, 512, 1024, 9999)] == [1, 2, 2, 4, 8, 8]
    assert plan(1, 64, 9999, limits(architecture=80)).parts == 1
    for tiles, parts in ((33, 8), (34, 4), (66, 4), (67, 2), (132, 2), (133, 1)):
        assert plan(tiles, 64, 1024, limits()).parts == parts
    assert plan(1, 576, 1024, limits()).parts == 4  # 45 tiles
