"""The Triton kernel of cosine_scores and contrastive_scores: its block loops, its configurations and its launches."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import NO_TRITON, assert_as_good_as_torch

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
reference = tp.reference
NAN, INF = float("nan"), float("inf")


def equal_but_for_rounding(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=16 * 2**-23, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "m", "channels"),
    [(1, 1, 1), (17, 1, 63), (16, 16, 64), (33, 65, 65), (5, 130, 7), (2, 3, 300)],
    ids=lambda v: str(v),
)
def test_blocks_that_are_full_and_blocks_that_are_not(dtype: torch.dtype, n: int, m: int, channels: int) -> None:
    features, queries = torch.randn(2, n, channels).to(dtype), torch.randn(2, m, channels).to(dtype)
    for reduction in ("max", "mean"):
        got = tp.cosine_scores(features, queries, reduction=reduction, backend="triton")
        exact = reference.cosine_scores(features.double(), queries.double(), reduction=reduction)
        assert_as_good_as_torch(got, exact, reference.cosine_scores(features, queries, reduction=reduction))


@pytest.mark.parametrize(
    ("n", "m"), [(1025, 3), (1025, 17), (4097, 17)], ids=["32 x 16", "32 x 64", "64 x 64"]
)  # fmt: skip
def test_larger_blocks_for_more_features(n: int, m: int) -> None:
    # Few of the features differ, so that the whole result can be compared quickly; the last block has one feature.
    features = torch.randn(1, 1, 3).expand(1, n, 3).half().clone()
    features[:, -5:] = torch.randn(1, 5, 3).half()
    queries = torch.randn(1, m, 3).half()
    got = tp.cosine_scores(features, queries, backend="triton")
    equal_but_for_rounding(got, reference.cosine_scores(features, queries))
    assert torch.equal(got[:, :-5], got[:, :1].expand(1, n - 5))


@pytest.mark.parametrize(("a", "r"), [(70, 3), (3, 70), (64, 64), (0, 65), (65, 0), (0, 0)])
def test_lists_of_several_blocks(a: int, r: int) -> None:
    features = torch.randn(2, 20, 9)
    anchors, references = torch.randint(-1, 20, (2, a)), torch.randint(-1, 20, (2, r))
    anchors[1], references[0] = -1, -1
    got = tp.contrastive_scores(features, anchors, references, backend="triton")
    exact = reference.contrastive_scores(features.double(), anchors, references)
    assert_as_good_as_torch(got, exact, reference.contrastive_scores(features, anchors, references))


@pytest.mark.parametrize("column", [0, 63, 64, 99], ids=["first", "end of a chunk", "next chunk", "last"])
@pytest.mark.parametrize("special", [NAN, INF, -INF, 3e19])
@pytest.mark.parametrize("where", ["feature", "query", "both"])
def test_an_element_that_is_special_wherever_it_lies(column: int, special: float, where: str) -> None:
    """3e19 is finite and its square is not: that unit vector is 0, and 0 times a NaN is NaN."""
    features, queries = torch.randn(1, 4, 100), torch.randn(1, 3, 100)
    if where != "query":
        features[0, 1, column] = special
    if where != "feature":
        queries[0, 2, column] = special
        features[0, 2, 5] = 3e19
    for reduction in ("max", "mean"):
        got = tp.cosine_scores(features, queries, reduction=reduction, backend="triton")
        equal_but_for_rounding(got, reference.cosine_scores(features, queries, reduction=reduction))


def test_a_masked_query_of_nans_costs_nothing() -> None:
    features, queries = torch.randn(1, 3, 8), torch.randn(1, 2, 8)
    queries[:, 1] = NAN
    mask = torch.tensor([[True, False]])
    for reduction in ("max", "mean"):
        got = tp.cosine_scores(features, queries, query_mask=mask, reduction=reduction, backend="triton")
        equal_but_for_rounding(got, reference.cosine_scores(features, queries[:, :1], reduction=reduction))


def test_strides_are_taken_as_they_are(launches: list[Any]) -> None:
    features, queries = torch.randn(5, 2, 8).transpose(0, 1), torch.randn(1, 3, 20)[..., 4:12].expand(2, 3, 8)
    tp.cosine_scores(features, queries, backend="triton")
    (launch,) = launches
    assert launch[2][0].stride() == features.stride()
    assert launch[2][1].stride() == queries.stride()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from tokenprune_kernels.triton import runtime

    seen: list[Any] = []
    monkeypatch.setattr(runtime, "recorder", lambda *launch: seen.append(launch))
    return seen


@pytest.mark.parametrize("n", [1, 576, 3000])
def test_one_launch(launches: list[Any], n: int) -> None:
    from tokenprune_kernels.triton.similarity import similarity_config

    features = torch.empty(3, n, 40)
    indices = torch.zeros(3, 100, dtype=torch.int64)
    calls = (
        lambda: tp.cosine_scores(features, features[:, :50], backend="triton"),
        lambda: tp.cosine_scores(features, features[:, :0], reduction="mean", backend="triton"),
        lambda: tp.contrastive_scores(features, indices, indices[:, :7], backend="triton"),
    )
    for i, call in enumerate(calls):
        call()
        assert len(launches) == i + 1
        block = similarity_config(torch.float32, n, 0, 40).blocks["BLOCK_N"]
        assert launches[i][1] == (3 * -(-n // block),)


def test_nothing_to_score_launches_nothing(launches: list[Any]) -> None:
    assert tp.cosine_scores(torch.empty(0, 5, 4), torch.empty(0, 2, 4), backend="triton").shape == (0, 5)
    assert tp.cosine_scores(torch.empty(2, 0, 4), torch.empty(2, 2, 4), backend="triton").shape == (2, 0)
    assert launches == []


@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 9000),
)  # fmt: skip
def test_configurations(dtype: torch.dtype, n: int, listed: int, channels: int) -> None:
    from tokenprune_kernels.triton.similarity import similarity_config

    config = similarity_config(dtype, n, listed, channels)
    sizes = config.blocks.values()
    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)  # what tl.dot and tl.arange take
    # Both operands of every stage fit the smallest shared memory there is, of gfx942.
    rows = config.blocks["BLOCK_N"] + config.blocks["BLOCK_L"]
    assert config.num_stages * rows * config.blocks["BLOCK_C"] * dtype.itemsize <= 64 << 10
    assert config.num_warps in (4, 8)
    # 576 tokens of one image occupy at least 18 multiprocessors.
    assert n > 1024 or config.blocks["BLOCK_N"] <= 32
