"""The column pass of the CUDA attention kernels on the host emulator: how heads, rows and columns are split, the
launches that each split takes, and that no split changes what is computed."""

from typing import Any

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
over_dtypes = pytest.mark.parametrize("dtype", dtypes_of("emulator"), ids=lambda d: str(d).removeprefix("torch."))
HEADS = ("mean", "sum", "max", "none")
ALL_ROWS = "last+mean+max+sum"


def device(**limits: int) -> None:
    for name, value in limits.items():
        setattr(module.settings(), name, value)


def inputs(batch: int, heads: int, key_heads: int, rows: int, keys: int, dim: int, dtype: torch.dtype = torch.float32
           ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key, and the lse of another softmax than theirs, as a caller may pass it."""
    query, key = torch.randn(batch, heads, rows, dim).to(dtype), torch.randn(batch, key_heads, keys, dim).to(dtype)
    lse = tp.reference.attention_entropy(query, key)[1] + torch.rand(batch, heads, rows)
    return query, key, lse


def check(query: Tensor, key: Tensor, lse: Tensor, **options: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """attention_scores compared with the reference in float64, and its column launches."""
    module.take_launches()
    got = tp.attention_scores(query, key, lse, backend="emulator", **options)
    launches = [launch for launch in module.take_launches() if "columns" in launch["kernel"]]
    exact = tp.reference.attention_scores(query.double(), key.double(), lse.double(), **options)
    plain = tp.reference.attention_scores(query, key, lse, **options)
    largest = exact[exact.isfinite()].abs()
    logit = max(1.0, float(lse[lse.isfinite()].abs().max()))
    assert_as_good_as_torch(got, exact, plain, scale=logit * max(1.0, float(largest.max()) if largest.numel() else 1.0))
    return got, launches


# --- the regimes -----------------------------------------------------------------------------------------------------

# name: (shape (batch, heads, key_heads, rows, keys, dim), device, head reduction,
#        (blocks, blocks of a cluster, teams of a block, launches))
REGIMES: dict[str, tuple[tuple[int, ...], dict[str, int], str, tuple[int, int, int, int]]] = {
    "one block per tile": ((1, 4, 4, 70, 130, 8), {"sm_count": 1}, "mean", (3, 1, 1, 1)),
    "one block, key tile resident": ((1, 6, 2, 70, 70, 8), {"sm_count": 1}, "max", (2, 1, 1, 1)),
    "cluster of 2": ((1, 4, 4, 20, 70, 8), {"sm_count": 2}, "mean", (4, 2, 1, 1)),
    "cluster of 8, grouped heads": ((1, 14, 2, 40, 20, 8), {}, "max", (8, 8, 1, 1)),
    "cluster of 8, two teams": ((1, 17, 17, 70, 20, 8), {}, "mean", (8, 8, 2, 1)),
    "cluster of 8, three teams": ((1, 24, 2, 3, 20, 8), {}, "sum", (8, 8, 3, 1)),
    "teams without clusters": ((1, 5, 5, 70, 70, 8), {"architecture": 80}, "mean", (2, 1, 3, 1)),
    "no memory for teams": ((1, 5, 5, 9, 20, 8), {"architecture": 89, "shared_per_block": 101376}, "max", (1, 1, 1, 1)),
    "row parts": ((1, 1, 1, 1090, 5, 8), {}, "mean", (2, 1, 1, 2)),
    "row parts of clusters": ((1, 2, 1, 1090, 5, 8), {}, "max", (4, 2, 1, 2)),
    "row parts, each head": ((1, 2, 2, 1090, 5, 8), {}, "none", (4, 1, 1, 2)),
    "each head, rows inside": ((1, 2, 1, 130, 70, 8), {}, "none", (4, 1, 1, 1)),
    "each head, rows inside, streamed": ((1, 2, 2, 70, 20, 264), {}, "none", (2, 1, 1, 1)),
    "ranges of heads": ((1, 6, 2, 5, 130, 8), {"sm_count": 3}, "none", (6, 1, 1, 1)),
    "ranges of heads, each its own keys": ((2, 6, 6, 5, 20, 8), {"sm_count": 2}, "none", (4, 1, 1, 1)),
    "more items than blocks": ((70, 1, 1, 1, 5, 1), {"sm_count": 1}, "mean", (64, 1, 1, 1)),
}  # fmt: skip
over_regimes = pytest.mark.parametrize("regime", REGIMES)


def set_up(regime: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    shape, limits, heads, _ = REGIMES[regime]
    device(**limits)
    return inputs(*shape, dtype=dtype), {"head_reduction": heads, "query_reduction": ALL_ROWS}


@over_regimes
def test_every_regime_takes_its_launches_and_agrees_with_the_reference(regime: str) -> None:
    arguments, options = set_up(regime)
    blocks, cluster, teams, launches = REGIMES[regime][3]
    _, made = check(*arguments, **options)
    assert len(made) == launches
    assert made[0]["grid"] == (blocks, 1, 1)
    assert made[0]["cluster"] == cluster
    assert made[0]["block"] == (128 * teams, 1, 1)
    assert all(launch["kernel"].startswith("attention_columns_combine_kernel") for launch in made[1:])


@over_dtypes
@pytest.mark.parametrize("heads", HEADS)
def test_every_instantiation(dtype: torch.dtype, heads: str) -> None:
    query, key, lse = inputs(1, 4, 2, 70, 70, 24, dtype)
    _, (launch,) = check(query, key, lse, head_reduction=heads, query_reduction=ALL_ROWS)
    storage = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}[dtype]
    assert storage in launch["kernel"]
    query_mask, key_mask = torch.rand(1, 70) < 0.7, torch.rand(1, 70) < 0.7
    for rows in (ALL_ROWS, "last"):
        check(query, key, lse, head_reduction=heads, query_reduction=rows, query_mask=query_mask, key_mask=key_mask,
              key_indices=torch.randint(-1, 70, (1, 9)), causal=True, cosine=True)  # fmt: skip


@over_dtypes
def test_row_parts_in_every_storage_type(dtype: torch.dtype) -> None:
    for heads in ("max", "none"):
        _, made = check(*inputs(1, 2, 1, 1090, 5, 8, dtype), head_reduction=heads, query_reduction="mean+max")
        assert len(made) == 2


@over_regimes
def test_masks_causality_and_listed_keys_in_every_regime(regime: str) -> None:
    (query, key, lse), options = set_up(regime)
    batch, _, rows, _ = query.shape
    keys = key.shape[2]
    listed = torch.randint(-1, keys, (batch, keys))
    key_mask, query_mask = torch.rand(batch, keys) < 0.7, torch.rand(batch, rows) < 0.7
    query_mask[0, rows // 2 :] = False  # the last row that counts lies far from the end
    positions = torch.randint(-2, keys + 2, (batch, rows))
    check(query, key, lse, key_indices=listed, key_mask=key_mask, query_mask=query_mask, causal=True,
          query_positions=positions, cosine=True, scale=3.0, **options)  # fmt: skip


@pytest.mark.parametrize(
    ("regime", "reduction"),
    [*((regime, ALL_ROWS) for regime in REGIMES), ("cluster of 8, two teams", "last"), ("ranges of heads", "last")],
)
def test_the_order_of_threads_and_blocks_changes_nothing(regime: str, reduction: str) -> None:
    (query, key, lse), options = set_up(regime)
    options |= {"query_reduction": reduction, "causal": True, "cosine": True}
    query_mask = torch.rand(query.shape[0], query.shape[2]) < 0.7
    results = []
    for schedule, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1)):
        device(schedule=getattr(module.Schedule, schedule), seed=seed)
        results.append(tp.attention_scores(query, key, lse, query_mask=query_mask, backend="emulator", **options))
    for other in results[1:]:
        assert torch.equal(other, results[0])


@over_regimes
def test_last_alone_is_last_among_others(regime: str) -> None:
    """Bit by bit, though alone only one row is computed, and a single launch made."""
    (query, key, lse), options = set_up(regime)
    query_mask = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    query_mask[0, 1:] = False
    among = tp.attention_scores(query, key, lse, query_mask=query_mask, backend="emulator", **options)[:, 0]
    alone, launches = check(query, key, lse, query_mask=query_mask, **options | {"query_reduction": "last"})
    assert torch.equal(alone, among)
    assert len(launches) == 1


@over_regimes
def test_equal_keys_get_equal_scores(regime: str) -> None:
    """Wherever they lie in a tile, also with rows that some tiles skip."""
    (query, key, lse), options = set_up(regime)
    key[:] = key[:, :, :1]
    for positions in (None, torch.full((query.shape[0], query.shape[2]), key.shape[2])):
        if positions is not None:
            positions[:, : query.shape[2] // 2] = -1
        scores = tp.attention_scores(query, key, lse, causal=positions is not None, query_positions=positions,
                                     backend="emulator", **options)  # fmt: skip
        assert torch.equal(scores, scores[..., :1].expand_as(scores))


@pytest.mark.parametrize("regime", ["one block per tile", "cluster of 8, two teams", "row parts of clusters"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_nan_reaches_exactly_the_scores_of_its_key(regime: str, heads: str) -> None:
    (query, key, lse), options = set_up(regime)
    key[0, -1, 3, 0] = torch.nan
    scores, _ = check(query, key, lse, **options | {"head_reduction": heads})
    assert scores[..., 3].isnan().all()
    assert not scores[..., [0, 1, 2, 4]].isnan().any()


@pytest.mark.parametrize("regime", ["one block per tile", "cluster of 8, two teams", "each head, rows inside"])
def test_a_row_with_lse_minus_infinity_gives_nothing_to_any_key(regime: str) -> None:
    """Not even to a NaN or an infinite one, in whichever tile and head it is; a logit of -inf gives 0 with NaN."""
    (query, key, lse), options = set_up(regime)
    key[0, 0, 2, 0], key[0, 0, 4, 0], key[0, :, 6, 0] = torch.nan, torch.inf, -torch.inf
    query[..., 0] = 1.0
    for blind in (slice(1, None), slice(0, -1)):
        given = lse.clone()
        given[:, :, blind] = -torch.inf
        scores, _ = check(query, key, given, **options)
        assert scores[..., 2].isnan().any()
        given[:, :, blind] = torch.nan
        scores, _ = check(query, key, given, **options)
        assert scores[..., 7].isnan().any()
        assert (scores[..., 6] == 0).all()
    lse[:] = -torch.inf
    assert (tp.attention_scores(query, key, lse, backend="emulator", **options) == 0).all()


def test_rows_that_do_not_count_may_hold_anything() -> None:
    """Whole tiles of rows, and single ones within a tile that counts."""
    query, key, lse = inputs(1, 2, 2, 260, 130, 8)
    positions = torch.arange(260).unsqueeze(0) // 2
    query_mask = torch.ones(1, 260, dtype=torch.bool)
    query_mask[:, 190:] = query_mask[:, 70] = False
    options: dict[str, Any] = {"causal": True, "query_positions": positions, "query_mask": query_mask,
                               "query_reduction": "max+sum"}  # fmt: skip
    want, _ = check(query, key, lse, **options)
    spoiled = lse.clone()
    spoiled[:, :, 190:] = spoiled[:, :, 70] = torch.nan
    assert torch.equal(tp.attention_scores(query, key, spoiled, backend="emulator", **options), want)


def test_more_row_reductions_than_a_launch_takes() -> None:
    query, key, lse = inputs(1, 2, 1, 5, 9, 8)
    names = [("mean", "last", "sum", "max", "max")[i % 5] for i in range(70)]
    scores, launches = check(query, key, lse, query_reduction="+".join(names))
    assert len(launches) == 3  # of 32 reductions each
    for i, name in enumerate(names):
        assert torch.equal(scores[:, i], scores[:, names.index(name)])


def test_every_byte_of_a_query_and_key_may_be_misaligned() -> None:
    """Slices whose vectors start anywhere give the bits of aligned copies."""
    for dtype in dtypes_of("emulator"):
        query, key, lse = inputs(1, 4, 2, 9, 70, 40, dtype)
        wide = torch.randn(1, 4, 9, 47).to(dtype)
        wide[..., 3:43] = query
        want, _ = check(query, key, lse)
        assert torch.equal(tp.attention_scores(wide[..., 3:43], key, lse, backend="emulator"), want)


# --- launches of a whole call ----------------------------------------------------------------------------------------

CALLS = {
    "LLaVA-1.5": (1, 32, 32, 64, 100, 8),
    "last row": (1, 32, 32, 1, 200, 8),
    "grouped": (1, 28, 4, 64, 100, 8),
    "one long head": (1, 1, 1, 1090, 70, 8),
    "many rows": (1, 2, 2, 1090, 5, 8),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("architecture", [80, 90])
def test_cross_attention_scores_takes_at_most_three_launches(call: str, architecture: int) -> None:
    """Two where the ranges of a row's keys meet in a cluster and all rows of a column in another."""
    at_most = 2 if architecture >= 90 and call in ("LLaVA-1.5", "last row", "grouped") else 3
    device(architecture=architecture)
    query, key, _ = inputs(*CALLS[call], dtype=torch.float16)
    for heads, rows in (("mean", "max+last"), ("none", "mean")):
        if heads == "none" and query.numel() > 10000:
            continue
        module.take_launches()
        got = tp.cross_attention_scores(query, key, head_reduction=heads, query_reduction=rows, backend="emulator")
        assert len(module.take_launches()) <= at_most
        want = tp.reference.cross_attention_scores(query, key, head_reduction=heads, query_reduction=rows)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_cosine_takes_one_launch_more() -> None:
    query, key, lse = inputs(1, 2, 1, 20, 9, 8)
    tp.cross_attention_scores(query, key, cosine=True, backend="emulator")
    kernels = [launch["kernel"].split("<")[0] for launch in module.take_launches()]
    assert kernels == ["attention_norms_kernel", "attention_rows_wide_kernel", "attention_columns_kernel"]
    tp.attention_scores(query, key, lse, cosine=True, backend="emulator")
    assert len(module.take_launches()) == 2


@pytest.mark.parametrize("cosine", [False, True])
def test_launches_overlap_where_the_device_lets_them(cosine: bool) -> None:
    query, key, lse = inputs(1, 2, 1, 1090, 70, 8)
    names = "+".join(["max", "mean"] * 20)
    for architecture in (80, 90):
        device(architecture=architecture)
        tp.cross_attention_scores(query, key[:, :, :65].repeat(1, 1, 40, 1), cosine=cosine, backend="emulator")
        tp.attention_scores(query, key, lse, cosine=cosine, query_reduction=names, backend="emulator")
        tp.attention_entropy(query[:, :, :9], key.repeat(1, 1, 40, 1), cosine=cosine, backend="emulator")
        launches = module.take_launches()
        first = [i for i, launch in enumerate(launches) if not launch["dependent"]]
        assert len(first) == (3 if architecture == 90 else len(launches))
        assert len(launches) >= 8


@pytest.mark.parametrize("which", [1, 2])
def test_a_refused_launch_names_the_op_and_the_shapes(which: int) -> None:
    query, key, lse = inputs(1, 1, 1, 1090, 5, 8)
    device(fail_launch=which)
    with pytest.raises(RuntimeError, match=r"attention_scores: CUDA error .* query \[1, 1, 1090, 8\] float32"):
        tp.attention_scores(query, key, lse, backend="emulator")


def test_nothing_to_score_is_no_launch() -> None:
    query, key, lse = inputs(2, 2, 2, 3, 5, 8)
    none = tp.attention_scores(query, key, lse, key_indices=torch.zeros(2, 0, dtype=torch.int64), backend="emulator")
    assert none.shape == (2, 0)
    assert module.take_launches() == []


# --- the planner -----------------------------------------------------------------------------------------------------

DEVICES = {
    "H200": (132, 227 * 1024, 90),
    "A100": (108, 163 * 1024, 80),
    "RTX 4090": (128, 99 * 1024, 89),
    "B200": (148, 227 * 1024, 100),
    "small": (1, 99 * 1024, 86),
}


def limits_of(name: str) -> Any:
    limits = module.DeviceLimits()
    limits.sm_count, limits.shared_per_block, limits.architecture = DEVICES[name]
    return limits


def plan(name: str, batch: int, heads: int, key_heads: int, rows: int, columns: int, dim: int, element: int = 2,
         per_head: bool = False, every_row: bool = False, last_only: bool = False, one_launch: bool = False
         ) -> Any:  # fmt: skip
    return module.plan_attention_columns(
        batch=batch, query_heads=heads, key_heads=key_heads, rows=rows, dim=dim, columns=columns, element_size=element,
        per_head=per_head, every_row=every_row, last_only=last_only, one_launch=one_launch, limits=limits_of(name),
    )  # fmt: skip


sizes = st.integers(0, 300) | st.sampled_from((576, 2880, 4096, 16384, 65536, 1 << 20, 1 << 27))


@hypothesis_settings(deadline=None, max_examples=200, print_blob=True)
@given(data=st.data())
def test_plans_cover_all_work_once_within_the_limits(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(sorted(DEVICES)))
    sm_count, shared, architecture = DEVICES[name]
    key_heads, group = draw(st.integers(0, 40)), draw(st.sampled_from((1, 4, 7, 32)))
    heads, batch, rows, columns = key_heads * group, draw(sizes), draw(sizes), draw(sizes)
    dim, element = draw(st.sampled_from((1, 64, 72, 128, 256, 257, 8192))), draw(st.sampled_from((2, 4)))
    flags = [draw(st.booleans()) for _ in range(4)]
    p = plan(name, batch, heads, key_heads, rows, columns, dim, element, *flags)
    per_head, every_row, last_only, one_launch = flags
    tile = module.column_tile

    assert p.key_tiles * tile >= columns > (p.key_tiles - 1) * tile or columns == p.key_tiles == 0
    counted = min(rows, 1) if last_only else rows
    assert p.row_parts >= 1
    assert p.rows_per_part % tile == 0
    assert (p.row_parts - 1) * p.rows_per_part < max(counted, 1) <= p.row_parts * p.rows_per_part
    parts = p.cluster * p.teams
    assert 1 <= parts <= max(heads, 1)
    assert 1 <= p.head_ranges <= max(heads, 1)
    assert parts == 1 if per_head else p.head_ranges == 1
    samples = 0 if every_row and rows == 0 else batch  # no row, no score
    assert p.items == samples * p.key_tiles * p.head_ranges * p.row_parts

    assert p.cluster in ((1, 2, 4, 8) if architecture >= 90 else (1,))
    assert p.teams * module.column_team_threads <= 384
    assert p.blocks % p.cluster == 0
    assert p.blocks // p.cluster == min(p.items, 64 * sm_count)  # below 2^31; they loop over the items
    assert p.shared + module.column_static_shared <= shared
    assert p.ring >= 8 * 128 * 16  # the parts are combined there
    if p.resident and not per_head:
        assert p.teams == 1  # teams must pass the same barriers

    assert p.launches() == (0 if p.items == 0 else 1 if one_launch or every_row or p.row_parts == 1 else 2)
    out_heads = heads if per_head else 1
    partial = 4 * p.partial_elements(batch, out_heads, columns)
    assert partial <= max(1 << 20, 0.01 * batch * heads * rows * columns * 4)


@pytest.mark.parametrize("name", DEVICES)
def test_the_head_split_does_not_depend_on_rows_or_on_their_reductions(name: str) -> None:
    for columns in (20, 576, 2000, 16384):
        for rows in (1, 64, 4096):
            splits = {
                (p.cluster, p.teams)
                for p in (plan(name, 1, 32, 8, r, columns, 128, last_only=last, one_launch=once)
                          for r in (1, rows) for last in (False, True) for once in (False, True))
            }  # fmt: skip
            assert len(splits) == 1


def test_plans_of_the_usual_shapes() -> None:
    """What docs/kernels/attention_columns.md says."""
    llava = plan("H200", 1, 32, 32, 64, 576, 128)
    assert (llava.cluster, llava.teams, llava.row_parts, llava.blocks) == (8, 2, 1, 72)
    qwen = plan("H200", 1, 28, 4, 64, 16384, 128)
    assert (qwen.cluster, qwen.teams, qwen.row_parts, qwen.blocks, qwen.resident) == (1, 1, 1, 256, True)
    square = plan("H200", 1, 32, 32, 4096, 4096, 128)
    assert (square.cluster, square.teams, square.blocks) == (4, 1, 256)
    prefill = plan("H200", 1, 32, 32, 4096, 576, 128)
    assert (prefill.cluster, prefill.teams, prefill.row_parts, prefill.launches()) == (8, 2, 2, 2)
    last = plan("H200", 1, 32, 32, 4096, 576, 128, last_only=True)
    assert (last.cluster, last.teams, last.row_parts, last.launches()) == (8, 2, 1, 1)
    rows = module.plan_attention_rows(1, 32, 64, 576, 128, 2, limits_of("H200"))
    assert rows.launches() + llava.launches() == 2
    ampere = plan("A100", 1, 32, 32, 64, 576, 128)
    assert (ampere.cluster, ampere.teams, ampere.blocks) == (1, 3, 9)
    for p in (llava, qwen, square, prefill, last, ampere):
        assert p.shared <= 163 * 1024
