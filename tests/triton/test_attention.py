"""The Triton attention kernels: every path of their wrappers in the interpreter, launches, and configurations."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import NO_TRITON, assert_as_good_as_torch

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
ROWS, COMBINE = "attention_rows_kernel", "attention_combine_kernel"
COLUMNS, PARTS = "attention_columns_kernel", "attention_parts_kernel"
DTYPES = st.sampled_from((torch.float16, torch.bfloat16, torch.float32))


@pytest.fixture
def kernels() -> Any:
    from tokenprune_kernels import triton
    from tokenprune_kernels.triton import attention, attention_columns, attention_rows, attention_tile, runtime

    class Modules:
        ops, wrappers, columns, rows, tile = triton, attention, attention_columns, attention_rows, attention_tile
        common = runtime

    return Modules


@pytest.fixture
def launches(kernels: Any) -> Iterator[list[tuple[str, int, dict[str, Any]]]]:
    """The launches of a call, which do not take place: kernel, grid, keywords."""
    seen: list[tuple[str, int, dict[str, Any]]] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((kernel.__name__, grid[0], keywords))

    kernels.common.recorder = record
    with kernels.common.assume(kernels.common.Target("cuda", 90)):
        yield seen
    kernels.common.recorder = None


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    batch, heads, key_heads, rows, keys, dim = shape
    return torch.randn(batch, heads, rows, dim).to(dtype), torch.randn(batch, key_heads, keys, dim).to(dtype)


def check(query: Tensor, key: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    got = tp.cross_attention_scores(query, key, backend="triton", **options)
    exact = tp.reference.cross_attention_scores(query.double(), key.double(), **options)
    plain = tp.reference.cross_attention_scores(query, key, **options)
    finite = exact[2][exact[2].isfinite()]
    logit = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    for mine, *others in zip(got, exact, plain, strict=True):
        top = others[0][others[0].isfinite()].abs()
        assert_as_good_as_torch(mine, *others, scale=logit * max(1.0, float(top.max()) if top.numel() else 1.0))
    return got


@pytest.mark.parametrize("dim", [8, 40, 72, 80, 96, 144, 256, 264, 67])
def test_vectors_of_every_kind(dim: int) -> None:
    """16-bit vectors in one piece, in two, in a loop, and unaligned ones, with and without their norms."""
    query, key = inputs(1, 2, 1, 9, 70, dim, dtype=torch.float16)
    check(query, key)
    check(query, key, cosine=True, scale=7.0)


def test_every_dot_product_of_a_tile() -> None:
    """With one visible key the lse is its logit: exact integers, in every row and at the edges of the key tiles."""
    visible_keys = [0, 15, 16, 63, 64, 66]
    query = torch.randint(-2, 3, (1, 1, 66, 72)).half()
    key = torch.randint(-2, 3, (1, 1, 67, 72)).half()
    expected = (query[0, 0].float() @ key[0, 0].float().mT).mT[visible_keys]
    query, key = query.expand(len(visible_keys), -1, -1, -1), key.expand(len(visible_keys), -1, -1, -1)
    visible = torch.zeros(len(visible_keys), 67, dtype=torch.bool)
    visible[range(len(visible_keys)), visible_keys] = True
    entropy, lse = tp.attention_entropy(query, key, key_mask=visible, scale=1.0, backend="triton")
    assert torch.equal(lse[:, 0], expected)
    assert (entropy == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_split_keys(dtype: torch.dtype) -> None:
    """Eight ranges of keys: some with nothing visible, some beyond the last key a causal row sees."""
    query, key = inputs(1, 4, 2, 2, 530, 24, dtype=dtype)
    mask = torch.rand(1, 530) < 0.5
    mask[:, 128:320] = False
    positions = torch.tensor([[-1, 63]])
    check(query, key, key_mask=mask)
    check(query, key, key_mask=mask, causal=True, query_positions=positions)


def test_splits_hold_what_is_not_finite() -> None:
    query, key = inputs(1, 1, 1, 3, 300, 8)
    for value in (math.nan, math.inf, -math.inf):
        for index in (0, 299):
            changed = key.clone()
            changed[0, 0, index, 3] = value
            check(query, changed)


@pytest.mark.parametrize("heads", ["mean", "max", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_row_parts(heads: str, masked: bool) -> None:
    """From 512 rows the rows of a column tile are shared: sums and maxima are combined in a launch of their own."""
    query, key = inputs(2, 2, 1, 520, 20, 8)
    mask = torch.rand(2, 520) < 0.3
    mask[0, 200:] = False  # the last row is not in the last part
    mask[1] = False
    options: dict[str, Any] = {"query_mask": mask} if masked else {"causal": True}
    together = check(query, key, head_reduction=heads, query_reduction="last+max+sum", **options)[0]
    for i, name in enumerate(("last", "max", "sum")):
        alone = tp.cross_attention_scores(
            query, key, head_reduction=heads, query_reduction=name, backend="triton", **options
        )[0]
        assert torch.equal(alone, together[:, i])
    if masked:
        check(query, key, head_reduction=heads, query_reduction="none", **options)


@pytest.mark.parametrize("heads", ["mean", "max", "none"])
def test_more_heads_per_key_head_than_a_tile_has(heads: str) -> None:
    query, key = inputs(1, 134, 2, 2, 20, 8, dtype=torch.float16)  # 67 = 64 + 3
    check(query, key, head_reduction=heads, query_reduction="max+mean")


@pytest.mark.parametrize("columns", [3, 1100, 4100])
def test_every_width_of_column_tiles(columns: int) -> None:
    """A key that is listed several times scores the same each time, wherever in a tile it lies.

    Small integers: the interpreter's product is BLAS's, whose rounding depends on the row and column within the tile.
    """
    query, key = torch.randint(-2, 3, (1, 2, 2, 16)).half(), torch.randint(-2, 3, (1, 1, 37, 16)).half()
    indices = torch.randint(-1, 37, (1, columns))
    got = check(query, key, key_indices=indices)[0]
    for j in range(-1, 37):
        assert got[indices == j].unique().numel() <= 1
    assert (got[indices == -1] == 0).all()


def test_nan_is_the_maximum_of_heads_and_of_rows() -> None:
    query, key = inputs(1, 2, 1, 20, 30, 8)
    query[0, 1, 17, 0] = -math.nan
    for heads in ("max", "mean"):
        for rows in ("max", "sum"):
            scores = tp.cross_attention_scores(query, key, head_reduction=heads, query_reduction=rows, backend="triton")
            assert scores[0].isnan().all()


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((1, 32, 32, 64, 576, 128), {}, [(ROWS, 32 * 8), (COMBINE, 16), (COLUMNS, 36)]),
        ((1, 28, 4, 1, 16384, 128), {}, [(ROWS, 4 * 64), (COMBINE, 2), (COLUMNS, 256)]),
        ((1, 28, 4, 64, 16384, 128), {"cosine": True}, [(ROWS, 4 * 4 * 32), (COMBINE, 56), (COLUMNS, 256)]),
        ((2, 32, 32, 4096, 4096, 128), {}, [(ROWS, 2 * 32 * 32), (COLUMNS, 2 * 16 * 64), (PARTS, 2 * 32)]),
        ((2, 32, 32, 4096, 4096, 128), {"query_reduction": "last"}, [(ROWS, 2 * 32 * 32), (COLUMNS, 2 * 64)]),
        ((2, 32, 32, 4096, 4096, 128), {"query_reduction": "none"}, [(ROWS, 2 * 32 * 32), (COLUMNS, 2 * 16 * 64)]),
        ((1, 16, 4, 64, 60, 64), {}, [(ROWS, 4 * 2), (COLUMNS, 4)]),
        ((1, 16, 4, 64, 60, 64), {"head_reduction": "none"}, [(ROWS, 4 * 2), (COLUMNS, 4 * 4)]),
        ((0, 16, 4, 64, 60, 64), {}, []),
        ((1, 16, 4, 0, 60, 64), {}, [(COLUMNS, 4)]),
        ((1, 16, 4, 64, 0, 64), {}, [(ROWS, 4 * 2)]),
        ((1, 0, 0, 64, 60, 64), {}, [(COLUMNS, 4)]),
    ],
)
def test_launches(
    shape: tuple[int, ...], options: dict[str, Any], expected: list[tuple[str, int]], kernels: Any, launches: list[Any]
) -> None:
    batch, heads, key_heads, rows, keys, dim = shape
    query = torch.empty(batch, heads, rows, dim, dtype=torch.float16)
    key = torch.empty(batch, key_heads, keys, dim, dtype=torch.float16)
    kernels.ops.cross_attention_scores(query, key, **options)
    assert [(name, grid) for name, grid, _ in launches] == expected


def test_launches_of_the_single_passes(kernels: Any, launches: list[Any]) -> None:
    query, key = inputs(1, 4, 2, 8, 600, 64)
    lse = kernels.ops.attention_entropy(query, key)[1]
    assert [name for name, _, _ in launches] == [ROWS, COMBINE]
    launches.clear()
    kernels.ops.attention_scores(query, key, lse)
    assert [name for name, _, _ in launches] == [COLUMNS]


def test_a_sample_is_split_alike_in_every_batch(kernels: Any, launches: list[Any]) -> None:
    for batch in (1, 5):
        kernels.ops.cross_attention_scores(*inputs(batch, 4, 2, 8, 600, 64))
    one, five = launches[:3], launches[3:]
    assert [keywords for _, _, keywords in one] == [keywords for _, _, keywords in five]
    assert [five[i][1] / one[i][1] for i in (0, 2)] == [5, 5]


def test_unit_of_strides(kernels: Any) -> None:
    unit_of = kernels.tile.unit_of
    query, key = inputs(1, 2, 1, 3, 4, 72)
    assert unit_of(query, key) == 8
    assert unit_of(query[..., :67], key[..., :67]) == 1
    odd = torch.empty(2, 3, 5, 73)[..., :72]
    assert unit_of(odd, odd) == 1
    assert unit_of(odd[:1, :1, :1], odd[:1, :1, :1]) == 8  # strides of dimensions with one entry say nothing


def power_of_two(x: int) -> bool:
    return x > 0 and x & (x - 1) == 0


@given(DTYPES, st.integers(1, 8192), st.sampled_from((1, 8)), st.sampled_from((128, 256)))
def test_pieces_cover_every_vector(dtype: torch.dtype, dim: int, unit: int, longest: int) -> None:
    from tokenprune_kernels.triton.attention_tile import pieces

    got = pieces(dtype, dim, unit, longest)
    block, tail = got["BLOCK_D"], got["BLOCK_TAIL"]
    assert power_of_two(block)
    assert block >= 16
    assert tail == 0 or (power_of_two(tail) and tail >= 16)
    assert got["STREAMED"] or block + tail >= dim
    assert not (got["STREAMED"] and tail)
    if unit == 8 and dtype != torch.float32 and dim in (64, 72, 80, 96, 128):
        assert block + tail == -(-dim // 16) * 16  # the head dimensions of real models waste nothing


@given(
    st.sampled_from((80, 90, 100, "gfx942")), DTYPES, st.integers(1, 8192), st.sampled_from((1, 8)),
    st.integers(0, 10000), st.integers(0, 200), st.integers(0, 100000),
)  # fmt: skip
def test_configurations(
    arch: Any, dtype: torch.dtype, dim: int, unit: int, rows: int, group: int, columns: int
) -> None:
    from tokenprune_kernels.triton.attention_columns import columns_config
    from tokenprune_kernels.triton.attention_rows import rows_config
    from tokenprune_kernels.triton.runtime import Target

    target = Target("hip", arch, 64) if arch == "gfx942" else Target("cuda", arch)
    shared = {80: 163, 90: 227, 100: 227, "gfx942": 64}[arch] * 1024
    size = 4 if dtype == torch.float32 else 2
    for config in (
        rows_config(target, dtype, dim, unit, rows * group),
        columns_config(target, dtype, dim, unit, rows, group, columns),
    ):
        b = config.blocks
        assert all(power_of_two(b[name]) and b[name] >= 16 for name in ("BLOCK_M", "BLOCK_N"))
        stages = config.num_stages - 1 if arch == "gfx942" else config.num_stages
        vectors = b["BLOCK_D"] + b["BLOCK_TAIL"]
        both = b["BLOCK_M"] + b["BLOCK_N"]
        # Resident rows take no stages; at most both operands do.
        needed = b["BLOCK_M"] + stages * b["BLOCK_N"] if "GROUP" not in b and not b["STREAMED"] else stages * both
        assert needed * vectors * size <= shared
        assert config.num_warps in (4, 8)
        if "GROUP" in b:
            assert b["BLOCK_M"] % b["GROUP"] == 0
            assert b["GROUP"] >= min(group, 64)


@given(st.integers(0, 10000), st.integers(0, 100000))
def test_ranges_of_keys(programs: int, keys: int) -> None:
    from tokenprune_kernels.triton.attention_rows import MOST_SPLITS, combine_config, key_splits

    splits = key_splits(programs, keys, 64)
    assert power_of_two(splits)
    assert splits <= MOST_SPLITS
    assert splits == 1 or splits * 64 <= keys
    assert combine_config(splits).blocks["BLOCK_R"] * splits == 1024


@given(st.integers(0, 100000))
def test_parts_of_rows(rows: int) -> None:
    from tokenprune_kernels.triton.attention_columns import MOST_PARTS, row_parts

    parts = row_parts(rows)
    assert power_of_two(parts)
    assert parts <= MOST_PARTS
    assert parts == 1 or parts * 256 <= rows


def test_code_of_row_reductions() -> None:
    from tokenprune_kernels.triton.attention_columns import REDUCTIONS, kinds_code

    names = ["last", "mean", "max", "sum", "mean"] * 5
    code = kinds_code(names)
    assert [REDUCTIONS[code // 4**r % 4] for r in range(len(names))] == names
