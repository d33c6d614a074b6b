"""query_reduction="none": every row keeps its scores, on every backend, within the tolerance of test_attention.py."""

from typing import Any

import pytest
import torch

import tokenprune_kernels as tp
from testing.cases import interpreted, over_backends, over_dtypes
from tests.ops.test_attention import HEADS, check, inputs


def every_row(backend: str, *arguments: Any, **options: Any) -> torch.Tensor:
    return tp.cross_attention_scores(*arguments, query_reduction="none", backend=backend, **options)[0]


@over_backends
@over_dtypes
@pytest.mark.parametrize("heads", HEADS)
def test_every_row_keeps_its_scores(backend: str, dtype: torch.dtype, heads: str) -> None:
    """Few rows and several tiles of them; two columns beyond a tile."""
    for rows in (2, 20 if interpreted(backend) else 130):
        query, key = inputs(2, 6, 2, rows, 66, 16, dtype)
        scores, _, lse = check(backend, query, key, head_reduction=heads, query_reduction="none")
        assert scores.shape == ((2, 6, rows, 66) if heads == "none" else (2, rows, 66))
        if heads in ("mean", "none"):
            torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]), rtol=1e-3, atol=1e-3)
        assert lse.shape == (2, 6, rows)


@over_backends
@pytest.mark.parametrize("heads", HEADS)
def test_a_row_is_what_last_gives_of_it(backend: str, heads: str) -> None:
    """Bit by bit: both join the heads in the same order."""
    query, key = inputs(1, 6, 2, 9, 50, 16)
    rows = every_row(backend, query, key, head_reduction=heads)
    for row in (0, 4, 8):
        alone = tp.cross_attention_scores(
            query, key, query_mask=torch.arange(9).unsqueeze(0) == row, head_reduction=heads, query_reduction="last",
            backend=backend,
        )[0]  # fmt: skip
        assert torch.equal(alone, rows[..., row, :])


@over_backends
@pytest.mark.parametrize("heads", ["max", "none"])
@pytest.mark.parametrize("rows", [3, 40])
def test_rows_outside_the_mask_are_zero(backend: str, heads: str, rows: int) -> None:
    """Whatever they hold; and so are columns without a key, hidden keys, and a sample of which no row counts."""
    query, key = inputs(3, 4, 2, rows, 70, 8)
    query_mask = torch.ones(3, rows, dtype=torch.bool)
    query_mask[0, : rows // 2] = query_mask[1, rows - 1] = query_mask[2] = False
    key_mask = torch.rand(3, 70) < 0.7
    listed = torch.randint(-1, 70, (3, 20))
    options: dict[str, Any] = {
        "query_mask": query_mask, "key_mask": key_mask, "key_indices": listed, "head_reduction": heads,
    }  # fmt: skip
    scores, _, _ = check(backend, query, key, query_reduction="none", **options)
    spoiled = query.clone()
    spoiled[~query_mask.unsqueeze(1).expand(3, 4, rows)] = torch.nan
    torch.testing.assert_close(every_row(backend, spoiled, key, **options), scores, rtol=1e-5, atol=1e-6)
    by_row = scores.transpose(1, 2) if heads == "none" else scores
    assert (by_row[~query_mask] == 0).all()
    hidden = (listed < 0) | ~key_mask.gather(1, listed.clamp_min(0))
    assert (scores.movedim(-1, 1)[hidden] == 0).all()


@over_backends
@pytest.mark.parametrize(("rows", "keys"), [(140, 70), (30, 140)])
def test_causal_rows_end_where_they_are(backend: str, rows: int, keys: int) -> None:
    """Tiles of rows that see none of the columns are not computed, and their scores are 0 all the same."""
    query, key = inputs(1, 2, 1, rows // 2 if interpreted(backend) else rows, keys, 8)
    check(backend, query, key, causal=True, query_reduction="none")
    positions = torch.randint(-2, keys + 2, (1, query.shape[2]))
    positions[0, :9] = -1
    check(backend, query, key, causal=True, query_positions=positions, query_reduction="none", cosine=True, scale=3.0)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 32, 32, 64, 576, 32), {"head_reduction": "max"}),  # heads are split over work items
        ((1, 28, 4, 300, 500, 16), {}),  # row blocks are
        ((2, 8, 8, 70, 300, 16), {"head_reduction": "none"}),
        ((1, 32, 8, 1, 4096, 64), {}),  # few rows
    ],
)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    query, key = inputs(*shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(every_row("auto", query, key, **options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    want = tp.reference.cross_attention_scores(query, key, query_reduction="none", **options)[0]
    torch.testing.assert_close(results[0], want, rtol=1e-4, atol=1e-6)


def test_none_is_joined_to_no_other() -> None:
    query, key = inputs(1, 1, 1, 2, 3, 4)
    expected = r"query_reduction must be one of mean, sum, max, last, or several joined by \+, or none alone"
    for asked in ("none+max", "max+none", "none+none", "rows", ""):
        with pytest.raises(ValueError, match=expected):
            tp.cross_attention_scores(query, key, query_reduction=asked)
        with pytest.raises(RuntimeError, match=expected):
            torch.ops.tokenprune.cross_attention_scores(query, key, query_reduction=asked)
