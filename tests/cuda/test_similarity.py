"""The similarity ops on the CUDA emulator: launches, regimes, alignment, special values, planner."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR, assert_as_good_as_torch, dtypes_of

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
DTYPES = dtypes_of("emulator")
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d).removeprefix("torch.") for d in DTYPES])
INF, NAN = math.inf, math.nan
BATCH = 2


def contrastive(features: Tensor, anchors: Tensor, references: Tensor) -> Tensor:
    return tp.contrastive_scores(features, anchors, references, backend="emulator")


def check(features: Tensor, anchors: Tensor, references: Tensor) -> Tensor:
    got = contrastive(features, anchors, references)
    exact = tp.reference.contrastive_scores(features.double(), anchors, references)
    assert_as_good_as_torch(got, exact, tp.reference.contrastive_scores(features, anchors, references))
    return got


def index_list(n: int, length: int) -> Tensor:
    return torch.randint(-1, n, (BATCH, length))


def launches() -> list[tuple[str, tuple[int, int, int], int]]:
    """(kernel without its namespace and parameters, grid, cluster) of what was launched."""
    names = ("warp_similarity", "tile_similarity", "unit_sum", "combine_sums")
    return [
        (next(name for name in names if name in launch["kernel"]), launch["grid"], launch["cluster"])
        for launch in module.take_launches()
    ]


# anchors, references, multiprocessors, kernels. The lists are short, long, in 2 to 4 parts, and in so many that they
# are combined first; one multiprocessor is soon busy, which asks for four features per warp.
REGIMES = [
    (3, 5, 132, ["warp_similarity"]),
    (3, 5, 1, ["warp_similarity"]),
    (0, 8, 132, ["warp_similarity"]),
    (8, 0, 1, ["warp_similarity"]),
    (2, 30, 132, ["unit_sum", "warp_similarity"]),
    (0, 20, 1, ["unit_sum", "warp_similarity"]),
    (1, 140, 132, ["unit_sum", "combine_sums", "warp_similarity"]),
    (9, 0, 132, ["tile_similarity"]),
    (70, 3, 132, ["unit_sum", "tile_similarity"]),
    (20, 129, 1, ["unit_sum", "combine_sums", "tile_similarity"]),
]


@over_dtypes
@pytest.mark.parametrize(("anchors", "references", "multiprocessors", "kernels"), REGIMES)
def test_regimes(dtype, anchors, references, multiprocessors, kernels):
    n, channels = 67, 90
    features = torch.randn(BATCH, n, channels).to(dtype)
    lists = index_list(n, anchors), index_list(n, references)
    module.settings().sm_count = multiprocessors
    got = check(features, *lists)  # rows of 90 elements are not whole 16-byte units
    made = launches()
    assert [name for name, _, _ in made] == kernels
    if kernels[-1] == "warp_similarity":
        rows = 4 * (4 if multiprocessors == 1 else 1)
        assert made[-1][1] == (BATCH * -(-n // rows), 1, 1)
    # The same numbers in aligned rows: padded with zeros, on 16 bytes.
    padded = torch.nn.functional.pad(features, (0, 96 - channels))
    assert torch.equal(contrastive(padded, *lists), got)
    # ... and off 16 bytes.
    shifted = torch.nn.functional.pad(padded, (1, 0))[..., 1:]
    assert torch.equal(contrastive(shifted, *lists), got)


# Chunks of 128 bytes of a row, multiprocessors, compute capability, KiB of shared memory; cluster and teams of a block.
# There are 4 tiles of features: full with 3 blocks on every multiprocessor, and shared between teams up to one block.
SHARES = [
    (18, 1, 90, 227, 1, 1), (18, 3, 90, 227, 2, 1), (18, 8, 90, 227, 4, 1), (18, 31, 90, 227, 8, 1),
    (18, 32, 90, 227, 8, 2), (5, 132, 90, 227, 2, 2), (8, 132, 90, 227, 4, 2), (8, 132, 100, 99, 4, 1),
    (7, 132, 80, 163, 1, 2), (1, 132, 80, 163, 1, 1),
]  # fmt: skip


@over_dtypes
@pytest.mark.parametrize(("chunks", "multiprocessors", "architecture", "shared", "cluster", "teams"), SHARES)
def test_clusters_and_teams_share_the_channels(dtype, chunks, multiprocessors, architecture, shared, cluster, teams):
    n, channels = 70, chunks * 128 // dtype.itemsize - 8
    features = torch.randn(BATCH, n, channels).to(dtype)
    lists = index_list(n, 66), index_list(n, 9)
    settings = module.settings()
    settings.sm_count, settings.architecture, settings.shared_per_block = multiprocessors, architecture, shared * 1024
    got = check(features, *lists)
    (launch,) = (launch for launch in module.take_launches() if "tile_similarity" in launch["kernel"])
    assert (launch["grid"], launch["cluster"]) == ((4 * cluster, 1, 1), cluster)
    assert (launch["block"], launch["shared"]) == ((128 * teams, 1, 1), 48 * 1024 * teams)
    shifted = torch.nn.functional.pad(features, (1, 0))[..., 1:]  # rows off 16 bytes
    assert torch.equal(contrastive(shifted, *lists), got)


@pytest.mark.parametrize(("anchors", "references"), [(3, 5), (2, 30), (30, 140)])
def test_launches_overlap_where_the_device_lets_them(anchors, references):
    features = torch.randn(BATCH, 20, 40)
    lists = index_list(20, anchors), index_list(20, references)
    results = []
    for architecture in (90, 80):
        module.settings().architecture = architecture
        results.append(contrastive(features, *lists))
        first, *others = (launch["dependent"] for launch in module.take_launches())
        assert not first
        assert all(dependent == (architecture == 90) for dependent in others)
    assert torch.equal(results[0], results[1])


def test_no_clusters_before_compute_capability_9():
    module.settings().architecture = 80
    check(torch.randn(BATCH, 20, 600), index_list(20, 30), index_list(20, 3))
    assert launches()[-1] == ("tile_similarity", (2, 1, 1), 1)


@over_dtypes
@pytest.mark.parametrize(("anchors", "references"), [(3, 5), (2, 20), (40, 20), (75, 140)])
def test_every_schedule_gives_the_same(dtype, anchors, references):
    features = torch.randn(BATCH, 40, 200).to(dtype)
    lists = index_list(40, anchors), index_list(40, references)
    results = []
    for schedule in (module.Schedule.forward, module.Schedule.reversed, module.Schedule.shuffled):
        module.settings().schedule = schedule
        results.append(contrastive(features, *lists))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@over_dtypes
def test_equal_rows_get_bitwise_equal_scores(dtype):
    features = torch.randn(BATCH, 1, 200).to(dtype).expand(BATCH, 101, 200)
    for multiprocessors in (1, 132):
        module.settings().sm_count = multiprocessors
        for m in (1, 8, 30, 70):
            queries = torch.randn(BATCH, m, 200).to(dtype)
            for reduction in ("max", "mean"):
                scores = tp.cosine_scores(features, queries, reduction=reduction, backend="emulator")
                assert torch.equal(scores, scores[:, :1].expand_as(scores))


@over_dtypes
@pytest.mark.parametrize("m", [5, 20, 70])
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_strides_and_masks(dtype, m, reduction):
    features = torch.randn(50, BATCH, 48).to(dtype).transpose(0, 1)
    queries = torch.randn(BATCH, m, 96).to(dtype)[..., ::2]
    mask = (torch.rand(m, BATCH) < 0.6).T
    got = tp.cosine_scores(features, queries, query_mask=mask, reduction=reduction, backend="emulator")
    plain = features.contiguous(), queries.contiguous()
    expected = tp.cosine_scores(*plain, query_mask=mask.contiguous(), reduction=reduction, backend="emulator")
    assert torch.equal(got, expected)


@over_dtypes
@pytest.mark.parametrize(("anchors", "references"), [(2, 3), (30, 0), (3, 40), (70, 200)])
def test_indices_that_are_no_rows_do_not_count(dtype, anchors, references):
    features = torch.randn(BATCH, 30, 40).to(dtype)
    lists = index_list(30, anchors), index_list(30, references)
    wild = torch.tensor([30, 2**40, -2, -(2**63)])
    spoiled = [torch.where(i < 0, wild[torch.randint(0, 4, i.shape)], i) for i in lists]
    assert torch.equal(contrastive(features, *spoiled), contrastive(features, *lists))
    nothing = [torch.full_like(i, 30) for i in lists]
    assert contrastive(features, *nothing).eq(0).all()


@pytest.mark.parametrize(
    ("dtype", "special"),
    [(dtype, special) for dtype in DTYPES[1:] for special in (NAN, INF, 1e30, 1e-30)] + [(DTYPES[0], INF)],
)
@pytest.mark.parametrize(
    ("anchors", "references", "multiprocessors"), [(3, 4, 1), (3, 40, 132), (40, 40, 132), (70, 0, 1)]
)
def test_special_rows(dtype, special, anchors, references, multiprocessors):
    """Rows with NaN or infinities spoil what they multiply; squares that overflow make a unit vector of zeros."""
    module.settings().sm_count = multiprocessors
    for part in (slice(None), slice(3, 5)):
        features = torch.randn(BATCH, 36, 260).to(dtype)
        features[:, 5::10, part] = special
        features[:, 6::10, 7] = -special
        good = torch.arange(36)[torch.arange(36) % 10 < 5]
        lists = [good[torch.randint(0, len(good), (BATCH, length))] for length in (anchors, references)]
        for spoiled in (-1, 0, 1):  # neither list, the anchors, the references have such rows
            if spoiled >= 0 and lists[spoiled].shape[1] > 0:
                lists[spoiled][0, 0], lists[spoiled][1, -1] = 5, 6
            got = contrastive(features, *lists)
            expected = tp.reference.contrastive_scores(features, *lists)
            torch.testing.assert_close(got, expected, rtol=0, atol=16 * 2**-23, equal_nan=True)


def test_tensor_core_sums_do_not_drift():
    """The cosine of a row of 8192 channels with itself is 1 to a few roundings, as are sums of 512 chunks."""
    features = torch.rand(1, 3, 8192).bfloat16() + 1
    anchors = torch.zeros(1, 9, dtype=torch.int64)
    scores = contrastive(features, anchors, anchors[:, :0])
    assert launches()[-1][0] == "tile_similarity"
    assert (scores[0, 0] - 1).abs() <= 4 * 2**-23


SIZES = st.one_of(st.integers(1, 200), st.integers(1, 70_000))


@hypothesis_settings(deadline=None, max_examples=300, print_blob=True)
@given(
    st.one_of(st.integers(1, 8), st.integers(1, 70_000)), st.one_of(SIZES, st.integers(1, 1 << 20)),
    st.one_of(st.integers(0, 8192), st.integers(0, 1 << 20)), st.sampled_from([2, 4]),
    st.one_of(st.integers(0, 10), SIZES), st.one_of(st.integers(0, 10), SIZES), st.integers(1, 200),
    st.sampled_from([80, 86, 89, 90, 100, 120]), st.sampled_from([48, 99, 163, 227]),
)  # fmt: skip
def test_planner(batch, n, dim, size, best, mean, multiprocessors, architecture, shared):
    limits = module.DeviceLimits()
    limits.sm_count, limits.architecture, limits.shared_per_block = multiprocessors, architecture, shared * 1024
    plan = module.plan_similarity(batch, n, dim, size, best, mean, limits)
    assert plan.tiles == (best > 8)
    if plan.tiles:
        tiles = batch * -(-n // 64)
        assert plan.blocks == tiles * plan.cluster
        assert plan.cluster in (1, 2, 4, 8)
        if plan.cluster > 1:
            assert architecture >= 90
            assert plan.blocks <= 3 * multiprocessors
            assert -(-dim * size // 128) >= 2 * plan.cluster  # two chunks for every block
        assert plan.teams in (1, 2)
        if plan.teams > 1:
            assert plan.blocks <= multiprocessors
            assert -(-dim * size // 128) >= 2 * plan.cluster  # a chunk for every team
            assert limits.shared_per_block > 2 * 48 * 1024
    else:
        assert (plan.cluster, plan.teams) == (1, 1)
        assert plan.rows_per_warp in (1, 4)
        assert plan.blocks == batch * -(-n // (4 * plan.rows_per_warp))
        assert (plan.rows_per_warp == 4) == (batch * -(-n // 16) >= 4 * multiprocessors)
    assert plan.blocks <= 2**32  # of 64-bit offsets: beyond 2^31 - 1 the launch is refused, at 2^33 and more features
    if best + mean <= 8 or mean == 0:
        assert (plan.groups, plan.workspace) == (0, 0)
        return
    assert 8 <= plan.rows_per_group <= 32
    assert (plan.groups - 1) * plan.rows_per_group < mean <= plan.groups * plan.rows_per_group
    assert plan.combine == (plan.groups > 4)
    assert plan.workspace == batch * dim * (plan.groups + plan.combine) + batch


# --- paired_cosine ---------------------------------------------------------------------------------------------------


def paired(a: Tensor, b: Tensor) -> Tensor:
    return tp.paired_cosine(a, b, backend="emulator")


def take_paired_launch() -> tuple[str, tuple[int, int, int], tuple[int, int, int]]:
    (launch,) = module.take_launches()
    return launch["kernel"], launch["grid"], launch["block"]


# Units of 16 bytes of a row, multiprocessors; the warps that share a pair of the 42. A device is busy with 16 warps on
# every multiprocessor, and a row is on its way at once with 4 units of each thread.
PAIR_WARPS = [(5, 132, 1), (128, 132, 1), (129, 132, 2), (257, 132, 4), (513, 132, 8), (1100, 132, 8), (1100, 2, 1),
              (1100, 3, 2), (1100, 10, 4), (1100, 11, 8), (0, 132, 1)]  # fmt: skip


@over_dtypes
@pytest.mark.parametrize(("units", "multiprocessors", "warps"), PAIR_WARPS)
def test_pairs_are_shared_between_warps(dtype, units, multiprocessors, warps):
    n, channels = 21, units * 16 // dtype.itemsize
    a, b = torch.randn(BATCH, n, channels).to(dtype), torch.randn(BATCH, n, channels).to(dtype)
    module.settings().sm_count = multiprocessors
    got = paired(a, b)
    name = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}[dtype]
    aligned = str(units > 0).lower()
    assert take_paired_launch() == (
        f"paired_cosine_kernel<{name}, {aligned}>",
        (-(-42 * warps // 8), 1, 1),
        (256, 1, 1),
    )
    exact = tp.reference.paired_cosine(a.double(), b.double())
    assert_as_good_as_torch(got, exact, tp.reference.paired_cosine(a, b))


@over_dtypes
@pytest.mark.parametrize("channels", [8, 640, 4104])
def test_alignment_of_pairs_changes_the_kernel_and_no_bit(dtype, channels):
    video = torch.randn(3, 10, channels).to(dtype)
    want = paired(video[1:], video[:-1])
    assert take_paired_launch()[0].endswith("true>")
    shifted = torch.nn.functional.pad(video, (1, 0))[..., 1:]  # rows off 16 bytes
    padded = torch.nn.functional.pad(video, (0, 8))[..., :channels]  # other strides
    for a, b, aligned in ((shifted, video, False), (video, shifted, False), (padded, video, True)):
        assert torch.equal(paired(a[1:], b[:-1]), want)
        assert take_paired_launch()[0].endswith(f"{str(aligned).lower()}>")
    # Rows that end within a unit: as if zeros followed.
    short = video[..., : channels - 3]
    filled = torch.nn.functional.pad(short, (0, 3))
    assert torch.equal(paired(short[1:], short[:-1]), paired(filled[1:], filled[:-1]))


@over_dtypes
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_pairs_of_any_strides(dtype, multiprocessors):
    """Frames next to each other in every token, one row for all, every other channel: what is legal and what copies."""
    module.settings().sm_count = multiprocessors
    video = torch.randn(7, 5, 640).to(dtype)
    views = [video.transpose(0, 1).contiguous().transpose(0, 1), video[:, :1].expand(7, 5, 640), video[::2],
             video.repeat_interleave(2, -1)[..., ::2]]  # fmt: skip
    for view in views:
        plain = view.contiguous()
        assert torch.equal(paired(view[1:], view[:-1]), paired(plain[1:].clone(), plain[:-1].clone()))


@over_dtypes
@pytest.mark.parametrize("channels", [40, 4104])
def test_equal_pairs_get_equal_bits_in_every_schedule(dtype, channels):
    a, b = (torch.randn(1, 1, channels).to(dtype).expand(BATCH, 13, channels) for _ in range(2))
    results = []
    for schedule in (module.Schedule.forward, module.Schedule.reversed, module.Schedule.shuffled):
        module.settings().schedule = schedule
        results.append(paired(a, b))
    assert all(torch.equal(result, results[0][:1, :1].expand_as(result)) for result in results)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("channels", [24, 2600])
@pytest.mark.parametrize("shift", [0, 1])
def test_special_pairs(dtype, channels, shift):
    """Every two of ordinary, zero, tiny, overflowing, infinite and NaN rows, with one warp per pair and several."""
    rows = torch.randn(9, channels + shift)[:, shift:]
    rows[2:7] = torch.tensor([0.0, 1e-30, 1e30, INF, NAN])[:, None]
    rows[7, :3], rows[8, -2:] = 1e30, -INF
    rows = rows.to(dtype)
    a, b = rows.repeat_interleave(9, 0)[None], rows.repeat(9, 1)[None]
    torch.testing.assert_close(paired(a, b), tp.reference.paired_cosine(a, b), rtol=0, atol=16 * 2**-23, equal_nan=True)


def test_a_failing_launch_of_pairs_is_reported():
    module.settings().fail_launch = 1
    with pytest.raises(RuntimeError, match=r"tokenprune::paired_cosine: CUDA error .* a \[1, 2, 3\] float32, b"):
        paired(torch.ones(1, 2, 3), torch.ones(1, 2, 3))


@hypothesis_settings(deadline=None, max_examples=300, print_blob=True)
@given(st.integers(0, 70_000), SIZES, st.integers(0, 1 << 20), st.sampled_from([2, 4]), st.integers(1, 200))
def test_planner_of_pairs(batch, n, dim, size, multiprocessors):
    limits = module.DeviceLimits()
    limits.sm_count = multiprocessors
    plan = module.plan_paired(batch, n, dim, size, limits)
    assert plan.warps in (1, 2, 4, 8)
    assert (plan.blocks - 1) * (8 // plan.warps) < max(batch * n, 1) <= max(plan.blocks, 1) * (8 // plan.warps)
    units = -(-dim * size // 16)
    if plan.warps > 1:  # with half as many, the device was not busy, and a thread read more than 4 units
        assert batch * n * plan.warps // 2 < 16 * multiprocessors
        assert units > 4 * 32 * plan.warps // 2
    if plan.warps < 8:
        assert batch * n * plan.warps >= 16 * multiprocessors or units <= 4 * 32 * plan.warps
