"""The row pass of the CUDA attention kernels (lse and entropy) on the host emulator, and the tile of dot products."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR, assert_as_good_as_torch, dtypes_of

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
over_dtypes = pytest.mark.parametrize("dtype", dtypes_of("emulator"), ids=lambda d: str(d).removeprefix("torch."))
INF = math.inf
WIDE, THIN, COMBINE, NORMS = (
    "attention_rows_wide_kernel",
    "attention_rows_thin_kernel",
    "attention_rows_combine_kernel",
    "attention_norms_kernel",
)


@pytest.fixture(autouse=True)
def machine() -> Iterator[Any]:
    """The emulated GPU, as it was before the test afterwards."""
    module = emulator.load()
    yield module.settings()
    module.settings().reset()


def check(query: Tensor, key: Tensor, **options: Any) -> tuple[Tensor, Tensor, list[str], list[int]]:
    """Entropy and lse, compared with the reference in float64; kernels and blocks of the launches they took."""
    emulator.load().take_launches()
    got = tp.attention_entropy(query, key, backend="emulator", **options)
    launches = emulator.load().take_launches()
    exact = tp.reference.attention_entropy(query.double(), key.double(), **options)
    plain = tp.reference.attention_entropy(query, key, **options)
    finite = exact[1][exact[1].isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    for mine, *others in zip(got, exact, plain, strict=True):
        assert_as_good_as_torch(mine, *others, scale=scale)
    return *got, [entry["kernel"].split("<")[0] for entry in launches], [entry["grid"][0] for entry in launches]


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def unaligned(t: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16 bytes."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


@over_dtypes
@pytest.mark.parametrize("dim", [1, 8, 17, 64, 72, 130, 256, 264])
@pytest.mark.parametrize("rows", [66, 16])
def test_every_dot_product_of_a_tile(dtype: torch.dtype, dim: int, rows: int) -> None:
    """With one visible key the lse is its logit: exact integers, at every row and at the corners of a tile's keys."""
    visible_keys = [0, 7, 8, 17, 63, 66]
    query = torch.randint(-2, 3, (1, 1, rows, dim)).to(dtype)
    key = torch.randint(-2, 3, (1, 1, 67, dim)).to(dtype)
    expected = (query[0, 0].float() @ key[0, 0].float().mT).mT[visible_keys]
    query, key = query.expand(len(visible_keys), -1, -1, -1), key.expand(len(visible_keys), -1, -1, -1)
    visible = torch.zeros(len(visible_keys), 67, dtype=torch.bool)
    visible[range(len(visible_keys)), visible_keys] = True
    entropy, lse = tp.attention_entropy(query, key, key_mask=visible, scale=1.0, backend="emulator")
    assert torch.equal(lse[:, 0], expected)
    assert (entropy == 0).all()


@over_dtypes
@pytest.mark.parametrize(
    ("heads", "key_heads", "rows", "keys", "dim", "kernel", "tiles"),
    [
        (3, 3, 16, 200, 64, THIN, 3),  # keys are spread over the warps
        (14, 2, 1, 130, 128, THIN, 2),  # the heads of a group are rows of one tile
        (2, 1, 20, 150, 80, WIDE, 1),
        (7, 1, 11, 100, 72, WIDE, 2),  # the second tile begins within the sixth head
        (1, 1, 130, 90, 300, WIDE, 3),  # vectors too long to stay in shared memory
        (1, 1, 5, 90, 300, THIN, 1),
    ],
)
def test_regimes(
    dtype: torch.dtype, heads: int, key_heads: int, rows: int, keys: int, dim: int, kernel: str, tiles: int
) -> None:
    emulator.load().settings().sm_count = 1  # no reason to split keys
    query, key = randn(2, heads, rows, dim, dtype=dtype), randn(2, key_heads, keys, dim, dtype=dtype)
    key_mask = torch.rand(2, keys) < 0.7
    for options in ({}, {"key_mask": key_mask}, {"causal": True}, {"cosine": True, "scale": 5.0}):
        norms = [NORMS] if "cosine" in options else []
        entropy, lse, kernels, blocks = check(query, key, **options)
        assert kernels == [*norms, kernel]
        assert blocks[-1] == 2 * tiles
        moved = tp.attention_entropy(unaligned(query), unaligned(key), backend="emulator", **options)
        if not norms:  # which are summed in another order
            assert torch.equal(moved[0], entropy)
            assert torch.equal(moved[1], lse)
        torch.testing.assert_close(moved[1], lse)


@over_dtypes
@pytest.mark.parametrize(("rows", "kernel"), [(2, THIN), (9, WIDE)])
@pytest.mark.parametrize("architecture", [80, 90])
def test_keys_are_split_to_fill_the_gpu(
    dtype: torch.dtype, rows: int, kernel: str, architecture: int, machine: Any
) -> None:
    """Without clusters every tile of keys is a block's, and a second launch has a warp per row; with them it is one."""
    expected = {80: ([kernel, COMBINE], [2 * 11, -(-4 * rows // 4)]), 90: ([kernel], [2 * 8])}[architecture]
    query, key = randn(1, 4, rows, 24, dtype=dtype), randn(1, 2, 700, 24, dtype=dtype)
    positions = torch.randint(-2, 701, (1, rows))
    positions[0, :2] = torch.tensor([-1, 63])  # no key; keys of the first range only
    key_mask = torch.rand(1, 700) < 0.5
    key_mask[:, 128:320] = False  # ranges of which nothing is visible
    for options in (
        {},
        {"key_mask": key_mask},
        {"causal": True, "query_positions": positions, "key_mask": key_mask},
        {"cosine": True, "causal": True},
    ):
        machine.architecture = architecture
        entropy, lse, kernels, blocks = check(query, key, **options)
        norms = [NORMS] if "cosine" in options else []
        assert (kernels, blocks[len(norms) :]) == ([*norms, *expected[0]], expected[1])
        machine.sm_count = 1
        whole = tp.attention_entropy(query, key, backend="emulator", **options)
        machine.reset()
        torch.testing.assert_close(whole[0], entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole[1], lse, rtol=1e-5, atol=1e-5)


def test_more_ranges_than_lanes(machine: Any) -> None:
    """The warp that joins a row's ranges takes several per lane."""
    *_, kernels, blocks = check(randn(1, 1, 1, 8), randn(1, 1, 64 * 40 + 3, 8))
    assert kernels == [THIN, COMBINE]
    assert blocks == [41, 1]


def test_a_cluster_may_have_more_blocks_than_ranges() -> None:
    query, key = randn(1, 1, 1, 8), randn(1, 1, 64 * 9 + 1, 8)
    check(query, key)
    tp.attention_entropy(query, key, backend="emulator")
    (launch,) = emulator.load().take_launches()
    assert (launch["grid"], launch["cluster"]) == ((8, 1, 1), 8)  # of two tiles each: five have keys


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("rows", "keys"), [(4, 300), (70, 150)])
def test_schedules_give_the_same_bits(rows: int, keys: int, architecture: int, causal: bool, machine: Any) -> None:
    machine.architecture = architecture
    query, key = randn(1, 2, rows, 40), randn(1, 1, keys, 40)
    options = {"causal": causal, "key_mask": torch.rand(1, keys) < 0.9, "cosine": True, "scale": 30.0}
    results = []
    for schedule in ("forward", "reversed", "shuffled"):
        machine.schedule = getattr(emulator.load().Schedule, schedule)
        results.append(tp.attention_entropy(query, key, backend="emulator", **options))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


@over_dtypes
@pytest.mark.parametrize("rows", [13, 100])
def test_equal_rows_get_equal_bits(dtype: torch.dtype, rows: int) -> None:
    """Wherever in a tile a row lies, it is summed in the same order."""
    query, key = randn(1, 1, 1, 96, dtype=dtype).expand(1, 3, rows, 96), randn(1, 1, 200, 96, dtype=dtype)
    for result in tp.attention_entropy(query, key, cosine=True, scale=20.0, backend="emulator"):
        assert (result == result[0, 0, 0]).all()


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize(("sm_count", "architecture"), [(1, 90), (132, 90), (132, 80)])
def test_special_logits(rows: int, sm_count: int, architecture: int, machine: Any) -> None:
    """D = 1: the logits are the keys. NaN wins, then +inf; -inf is as good as hidden; hidden ones do nothing."""
    machine.sm_count, machine.architecture = sm_count, architecture  # 1: one range of keys; 132: eight
    keys, nan = 500, math.nan
    cases: list[tuple[dict[int, float], float | None, float | None]] = [
        ({5: INF}, INF, nan),
        ({440: INF, 3: INF}, INF, nan),
        ({70: nan}, nan, nan),
        ({3: INF, 450: nan}, nan, nan),
        ({0: nan, 499: INF}, nan, nan),
        ({7: -INF, 290: -INF}, None, None),
        ({20: 3e38, 450: -3e38}, 3e38, 0.0),
        (dict.fromkeys(range(keys), -INF), -INF, 0.0),
        (dict.fromkeys(range(keys), nan), nan, nan),
        ({i: 150.0 - i for i in range(keys)}, None, None),  # the maximum comes first, then last
        ({i: i - 550.0 for i in range(keys)}, None, None),
        ({50: INF, 51: nan, 52: -INF}, None, None),  # hidden below
    ]
    values = torch.linspace(-1, 1, keys).repeat(len(cases), 1)
    for b, (spoiled, _, _) in enumerate(cases):
        values[b, list(spoiled)] = torch.tensor(list(spoiled.values()))
    key_mask = torch.ones(len(cases), keys, dtype=torch.bool)
    key_mask[-1, 50:53] = False
    query, key = torch.ones(len(cases), 1, rows, 1), values.view(len(cases), 1, keys, 1)
    entropy, lse, kernels, _ = check(query, key, key_mask=key_mask, scale=1.0)
    assert kernels == [THIN if rows == 3 else WIDE, *([COMBINE] if architecture == 80 else [])]
    for b, (_, expected_lse, expected_entropy) in enumerate(cases):
        if expected_lse is None:
            assert lse[b].isfinite().all()
            assert entropy[b].isfinite().all()
            continue
        torch.testing.assert_close(lse[b], torch.full_like(lse[b], expected_lse), equal_nan=True)
        torch.testing.assert_close(entropy[b], torch.full_like(entropy[b], expected_entropy), equal_nan=True)


@over_dtypes
@pytest.mark.parametrize("slope", [-1.0, -0.05, 0.05, 0.3, 3.0])  # of the logits, from key to key
def test_the_maximum_of_a_row_may_move_from_tile_to_tile(dtype: torch.dtype, slope: float, machine: Any) -> None:
    """A row's terms are measured from an earlier maximum as long as they stay small: rising logits raise it."""
    machine.sm_count, machine.architecture = 1, 80  # one range of keys
    key = slope * torch.arange(300.0)[:, None] * torch.tensor([1.0, 0.5]) + 0.1 * torch.randn(300, 2)
    query = torch.tensor([1.0, 0.0]) + 0.01 * torch.randn(40, 2)
    check(query[None, None].to(dtype), key[None, None].to(dtype), scale=1.0)
    check(query[None, None].to(dtype), key[None, None].to(dtype), scale=-1.0)


def test_norms_of_aligned_and_other_vectors() -> None:
    """Zero vectors, vectors below the floor of the norm, and lengths that are no multiple of anything."""
    for dtype in dtypes_of("emulator"):
        for dim in (3, 40, 520):
            query, key = randn(1, 2, 5, dim, dtype=dtype), randn(1, 1, 30, dim, dtype=dtype)
            query[0, 0, 1] = 0
            key[0, 0, 4] = 0
            key[0, 0, 5] = 0
            key[0, 0, 5, 0] = 1e-20
            entropy, lse, *_ = check(query, key, cosine=True, scale=50.0)
            torch.testing.assert_close(lse[0, 0, 1], torch.tensor(math.log(30)))
            torch.testing.assert_close(entropy[0, 0, 1], torch.tensor(math.log(30)))


def test_a_refused_launch_is_reported(machine: Any) -> None:
    query, key = randn(1, 1, 2, 8), randn(1, 1, 700, 8)
    machine.architecture = 80
    for launch in (1, 2, 3):
        machine.fail_launch = launch
        with pytest.raises(RuntimeError, match=r"tokenprune::attention_entropy: CUDA error.*for query .*, key "):
            tp.attention_entropy(query, key, cosine=True, backend="emulator")


@settings(deadline=None, max_examples=25, print_blob=True)
@given(data=st.data())
def test_random_calls(data: st.DataObject) -> None:
    draw = data.draw
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 7)))
    rows, keys, dim = draw(st.integers(1, 40)), draw(st.integers(1, 220)), draw(st.integers(1, 140))
    dtype = draw(st.sampled_from(dtypes_of("emulator")))
    torch.manual_seed(draw(st.integers(0, 1000)))
    options: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "cosine": draw(st.booleans()),
        "scale": draw(st.sampled_from((None, 0.0, -0.5, 2.0))),
    }
    if draw(st.booleans()):
        options["key_mask"] = torch.rand(batch, keys) < draw(st.sampled_from((0.1, 0.8)))
    if draw(st.booleans()):
        options["query_positions"] = torch.randint(-2, keys + 2, (batch, rows))
    module = emulator.load()
    module.settings().sm_count = draw(st.sampled_from((1, 3, 132)))
    module.settings().schedule = module.Schedule.shuffled
    module.settings().seed = draw(st.integers(0, 1000))
    query, key = (
        randn(batch, key_heads * group, rows, dim, dtype=dtype),
        randn(batch, key_heads, keys, dim, dtype=dtype),
    )
    *_, kernels, _ = check(query, key, **options)
    assert len(kernels) <= 2 + options["cosine"]


sizes = st.one_of(st.integers(0, 300), st.integers(0, 1 << 20))


@settings(deadline=None, max_examples=400, print_blob=True)
@given(
    batch=st.integers(0, 4096),
    key_heads=st.integers(0, 128),
    group_rows=st.one_of(sizes, st.integers(0, 1 << 24)),
    keys=st.one_of(sizes, st.integers(0, 1 << 36)),
    dim=st.one_of(st.integers(1, 300), st.integers(1, 1 << 30)),
    element_size=st.sampled_from((2, 4)),
    sm_count=st.integers(1, 300),
    shared=st.sampled_from((99 * 1024, 163 * 1024, 227 * 1024)),
    architecture=st.sampled_from((80, 90)),
)
def test_plans(
    batch: int, key_heads: int, group_rows: int, keys: int, dim: int, element_size: int, sm_count: int, shared: int,
    architecture: int,
) -> None:  # fmt: skip
    """Every key of every row belongs to one block, within the limits of the device."""
    module = emulator.load()
    limits = module.DeviceLimits()
    limits.sm_count, limits.shared_per_block, limits.architecture = sm_count, shared, architecture
    plan = module.plan_attention_rows(batch, key_heads, group_rows, keys, dim, element_size, limits)
    tile, key_tiles = module.tile_vectors, -(-keys // module.tile_vectors)
    tiles = batch * key_heads * plan.row_tiles
    assert (plan.row_tiles - 1) * tile < group_rows <= plan.row_tiles * tile
    assert plan.thin == (group_rows <= module.thin_rows)
    assert plan.splits >= 1
    assert plan.splits * plan.split_tiles >= key_tiles
    assert (plan.splits - 1) * plan.split_tiles < max(key_tiles, 1)  # no range is empty
    assert plan.split_tiles * tile < 1 << 31
    assert plan.cluster in ((1, 2, 4, 8) if architecture >= 90 else (1,))
    assert plan.cluster == 1 or 1 < plan.splits <= plan.cluster
    assert plan.launches() == (2 if plan.splits > 1 and plan.cluster == 1 else 1)
    assert plan.blocks == tiles * max(plan.splits, plan.cluster)
    assert plan.shared <= shared
    assert plan.workspace == (batch * key_heads * group_rows * plan.splits * 4 if plan.launches() > 1 else 0)
    if keys < 1 << 30:
        assert plan.splits == 1 or plan.blocks <= 16 * sm_count  # so the workspace is bounded by the device
        if tiles and plan.splits == 1 and key_tiles > 8:
            assert tiles > sm_count // 2 or tiles * key_tiles > sm_count  # not idle for want of ranges


def test_plans_of_models() -> None:
    """Two tiles of keys a block at LLaVA-1.5's size; about 4 blocks per SM for a long context; no ranges at prefill."""
    module = emulator.load()
    limits = module.DeviceLimits()

    def plan(key_heads: int, rows: int, keys: int) -> tuple[int, int]:
        chosen = module.plan_attention_rows(1, key_heads, rows, keys, 128, 2, limits)
        return chosen.splits, chosen.blocks

    assert plan(32, 64, 576) == (5, 256)
    splits, blocks = plan(4, 7 * 64, 16384)
    assert splits > 1
    assert 0.8 * 4 * 132 <= blocks <= 4 * 132
    assert plan(32, 4096, 4096) == (1, 2048)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    """A warp takes all its rows at once while their maxima stay; where one moves, the others keep their bits."""
    query, key = randn(1, 1, 32, 16, dtype=dtype), randn(1, 1, 256, 16, dtype=dtype)
    key[0, 0, 200] = 4 * query[0, 0, 5]  # row 5's maximum moves by far in the last tile
    calm = query.clone()
    calm[0, 0, 5] = 0
    moved, stays = (tp.attention_entropy(rows, key, scale=1.0, backend="emulator") for rows in (query, calm))
    others = [row for row in range(32) if row != 5]
    for mine, other in zip(moved, stays, strict=True):
        assert torch.equal(mine[..., others], other[..., others])
        assert not torch.equal(mine, other)
    check(query, key, scale=1.0)
