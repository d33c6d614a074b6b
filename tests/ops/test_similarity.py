"""The cosine ops: against the float64 reference, their identities, the edges of their domain."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import (
    BACKENDS,
    GPU_BACKENDS,
    assert_as_good_as_torch,
    backends_of,
    compiled,
    dtypes_of,
    over_backends,
    over_capabilities,
    over_dtypes,
    run_with_capability,
)

INF, NAN = math.inf, math.nan
REDUCTIONS = ("max", "mean")
over_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
reference = tp.reference


def ternary(batch: int, n: int, channels: int) -> Tensor:
    """Rows of 16 entries +-1, the rest 0: norm 4, so that cosines are exact in every dtype and order of summation."""
    rows = torch.zeros(batch, n, channels)
    channel = torch.rand(batch, n, channels).argsort(-1)[..., :16]
    return rows.scatter_(2, channel, torch.randint(0, 2, channel.shape).float() * 2 - 1)


def index_list(batch: int, n: int, length: int) -> Tensor:
    """Random entries with repetitions and -1."""
    return torch.randint(-1, n, (batch, length))


def check_cosine(features: Tensor, queries: Tensor, mask: Tensor | None, reduction: str, backend: str) -> None:
    got = tp.cosine_scores(features, queries, query_mask=mask, reduction=reduction, backend=backend)
    wide = features.double(), queries.double()
    exact = reference.cosine_scores(*wide, query_mask=mask, reduction=reduction)
    assert_as_good_as_torch(
        got, exact, reference.cosine_scores(features, queries, query_mask=mask, reduction=reduction)
    )


def check_contrastive(features: Tensor, anchors: Tensor, references: Tensor, backend: str) -> None:
    got = tp.contrastive_scores(features, anchors, references, backend=backend)
    exact = reference.contrastive_scores(features.double(), anchors, references)
    assert_as_good_as_torch(got, exact, reference.contrastive_scores(features, anchors, references))


@over_backends
@over_dtypes
@over_reductions
@pytest.mark.parametrize("channels", [1, 72, 80, 515])
def test_cosine_scores(backend: str, dtype: torch.dtype, reduction: str, channels: int) -> None:
    # Around the width of a panel: queries go one by one, in padded panels, in full panels, or in both.
    shapes = [(2, 50, 1), (1, 97, 5), (2, 49, 11), (1, 13, 38), (3, 1, 64), (1, 100, 75)]
    if backend == "triton" and channels > 100:  # slow where it is interpreted
        shapes = [(2, 20, 1), (1, 13, 38), (1, 20, 75)]
    for batch, n, m in shapes:
        features, queries = torch.randn(batch, n, channels).to(dtype), torch.randn(batch, m, channels).to(dtype)
        check_cosine(features, queries, None, reduction, backend)
        check_cosine(features, queries, torch.rand(batch, m) < 0.7, reduction, backend)


@over_backends
@over_dtypes
@pytest.mark.parametrize("channels", [1, 72, 80, 515])
def test_contrastive_scores(backend: str, dtype: torch.dtype, channels: int) -> None:
    for batch, n, a, r in [(2, 50, 1, 1), (1, 97, 40, 10), (2, 30, 0, 7), (2, 30, 9, 0), (1, 61, 77, 100)]:
        features = torch.randn(batch, n, channels).to(dtype)
        check_contrastive(features, index_list(batch, n, a), index_list(batch, n, r), backend)


@settings(deadline=None, max_examples=40, print_blob=True)
@given(
    st.integers(0, 3), st.integers(1, 110), st.integers(0, 70), st.integers(1, 90), st.integers(1, 300),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes(batch: int, n: int, m: int, r: int, channels: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    features, queries = torch.randn(batch, n, channels).to(dtype), torch.randn(batch, m, channels).to(dtype)
    for backend in BACKENDS:
        if dtype not in dtypes_of(backend):
            continue
        if backend in ("emulator", "triton"):  # slow: one sample is as good as three
            features, queries = features[:1, : 70 if backend == "emulator" else 40], queries[:1]
        samples, tokens = features.shape[:2]
        for reduction in REDUCTIONS:
            check_cosine(features, queries, torch.rand(samples, m) < 0.6, reduction, backend)
        check_contrastive(features, index_list(samples, tokens, m), index_list(samples, tokens, r), backend)


@over_backends
@over_dtypes
def test_exactly_representable_inputs_give_exact_scores(backend: str, dtype: torch.dtype) -> None:
    features, queries = ternary(2, 70, 96).to(dtype), (ternary(2, 64, 96) * 4).to(dtype)
    for reduction in REDUCTIONS:  # 64 queries: the mean is a division by a power of two
        got = tp.cosine_scores(features, queries, reduction=reduction, backend=backend)
        exact = reference.cosine_scores(features.double(), queries.double(), reduction=reduction)
        assert torch.equal(got.double(), exact)
    anchors, references = torch.randint(0, 70, (2, 45)), torch.randint(0, 70, (2, 16))
    got = tp.contrastive_scores(features, anchors, references, backend=backend)
    assert torch.equal(got.double(), reference.contrastive_scores(features.double(), anchors, references))


# Bitwise promises are those of the compiled ops: the references go through BLAS, whose order of summation varies.
@compiled
@over_dtypes
def test_equal_rows_get_bitwise_equal_scores(dtype: torch.dtype) -> None:
    backend = "cpu"
    for channels in (5, 72, 700):
        features = torch.randn(2, 1, channels).expand(2, 101, channels).to(dtype)
        for m in (1, 3, 13, 32, 70):
            queries = torch.randn(2, m, channels).to(dtype)
            for reduction in REDUCTIONS:
                scores = tp.cosine_scores(features, queries, reduction=reduction, backend=backend)
                assert torch.equal(scores, scores[:, :1].expand_as(scores))
        scores = tp.contrastive_scores(
            features.contiguous(), index_list(2, 101, 40), index_list(2, 101, 9), backend=backend
        )
        assert torch.equal(scores, scores[:, :1].expand_as(scores))


@over_backends
@over_dtypes
@over_reductions
def test_masked_queries_do_not_matter(backend: str, dtype: torch.dtype, reduction: str) -> None:
    features, queries = torch.randn(2, 20, 33).to(dtype), torch.randn(2, 40, 33).to(dtype)
    mask = torch.rand(2, 40) < 0.5
    mask[1] = False
    expected = tp.cosine_scores(features, queries, query_mask=mask, reduction=reduction, backend=backend)
    queries[~mask] = NAN
    got = tp.cosine_scores(features, queries, query_mask=mask, reduction=reduction, backend=backend)
    assert torch.equal(got, expected)
    assert (got[1] == 0).all()
    assert tp.cosine_scores(features, queries[:, :0], reduction=reduction, backend=backend).eq(0).all()


@over_backends
@over_dtypes
@pytest.mark.parametrize("m", [2, 12, 33])
def test_scale_and_sign_of_vectors(backend: str, dtype: torch.dtype, m: int) -> None:
    features, queries = ternary(1, 20, 48).to(dtype), ternary(1, m, 48).to(dtype)
    got = tp.cosine_scores(features, queries, backend=backend)
    assert torch.equal(tp.cosine_scores(features * 8, queries / 4, backend=backend), got)
    both = torch.cat([queries, -queries], 1)
    assert (tp.cosine_scores(features, both, backend=backend) >= 0).all()
    assert torch.equal(tp.cosine_scores(features, both, reduction="mean", backend=backend), torch.zeros_like(got))
    assert torch.equal(tp.cosine_scores(queries, queries, backend=backend), torch.ones(1, m).to(got.dtype))


@over_backends
@over_reductions
@pytest.mark.parametrize("m", [1, 3, 20, 32, 50])
@pytest.mark.parametrize("special", [0.0, NAN, INF, -INF, 1e30, 1e-30])
def test_special_values(backend: str, reduction: str, m: int, special: float) -> None:
    # 1e30: the squares overflow in float32, so the unit vector is 0; 1e-30: below the floor of the norm.
    for filled in (slice(None), slice(0, 1)):
        features, queries = torch.randn(2, 20 if backend == "triton" else 60, 24), torch.randn(2, m, 24)
        features[:, ::7, filled] = special
        for in_queries in (False, True):
            if in_queries:
                queries[:, m // 2, filled] = special
            got = tp.cosine_scores(features, queries, reduction=reduction, backend=backend)
            expected = reference.cosine_scores(features, queries, reduction=reduction)
            torch.testing.assert_close(got, expected, rtol=0, atol=16 * 2**-23, equal_nan=True)
        anchors, references = torch.tensor([[0, 5, -1], [1, 2, 3]]), torch.tensor([[7, 8], [9, 10]])
        got = tp.contrastive_scores(features, anchors, references, backend=backend)
        expected = reference.contrastive_scores(features, anchors, references)
        torch.testing.assert_close(got, expected, rtol=0, atol=16 * 2**-23, equal_nan=True)


@over_backends
def test_contrastive_is_the_difference_of_its_parts(backend: str) -> None:
    features = torch.randn(2, 40, 32)
    anchors, references = torch.randint(0, 40, (2, 12)), torch.randint(0, 40, (2, 9))
    none = torch.full((2, 3), -1)
    rows = torch.arange(2).unsqueeze(1)
    best = tp.cosine_scores(features, features[rows, anchors], backend=backend)
    mean = tp.cosine_scores(features, features[rows, references], reduction="mean", backend=backend)
    floor = 16 * 2**-23
    torch.testing.assert_close(
        tp.contrastive_scores(features, anchors, none, backend=backend), best, rtol=0, atol=floor
    )
    torch.testing.assert_close(
        tp.contrastive_scores(features, none, references, backend=backend), -mean, rtol=0, atol=floor
    )
    torch.testing.assert_close(
        tp.contrastive_scores(features, anchors, references, backend=backend), best - mean, rtol=0, atol=floor
    )
    assert tp.contrastive_scores(features, none, none[:, :0], backend=backend).eq(0).all()
    twice = torch.cat([references, references], 1)
    torch.testing.assert_close(
        tp.contrastive_scores(features, anchors, twice, backend=backend), best - mean, rtol=0, atol=floor
    )
    repeated = torch.cat([references, references[:, :1].expand(2, 30)], 1)  # an entry listed again counts again
    weighted = tp.cosine_scores(features, features[rows, repeated], reduction="mean", backend=backend)
    torch.testing.assert_close(
        tp.contrastive_scores(features, none, repeated, backend=backend), -weighted, rtol=0, atol=floor
    )
    assert (weighted - mean).abs().max() > 0.01


@over_backends
@pytest.mark.parametrize("value", [-2, 10, 2**40, -(2**63)])
@pytest.mark.parametrize("of_anchors", [True, False])
def test_indices_out_of_range(backend: str, value: int, of_anchors: bool) -> None:
    features, good, bad = torch.randn(2, 10, 4), torch.tensor([[0], [9]]), torch.tensor([[0, 1], [-1, value]])
    lists = (bad, good) if of_anchors else (good, bad)
    if backend in GPU_BACKENDS:  # counts as -1
        legal = [torch.where(i == value, -1, i) for i in lists]
        got = tp.contrastive_scores(features, *lists, backend=backend)
        assert torch.equal(got, tp.contrastive_scores(features, *legal, backend=backend))
        return
    with pytest.raises(IndexError):
        tp.contrastive_scores(features, *lists, backend=backend)


def test_index_error_names_the_op_and_the_value() -> None:
    with pytest.raises(IndexError, match=r"contrastive_scores: reference_indices must lie in \[-1, 3\), got 3"):
        torch.ops.tokenprune.contrastive_scores(torch.rand(1, 3, 2), torch.tensor([[0]]), torch.tensor([[3]]))


@compiled
@over_dtypes
def test_strided_inputs(dtype: torch.dtype) -> None:
    features, queries = torch.randn(60, 3, 40).to(dtype).transpose(0, 1), torch.randn(3, 37, 80).to(dtype)[..., ::2]
    plain = features.contiguous(), queries.contiguous()
    mask = (torch.rand(37, 3) < 0.7).T
    for reduction in REDUCTIONS:
        got = tp.cosine_scores(features, queries, query_mask=mask, reduction=reduction, backend="cpu")
        expected = tp.cosine_scores(*plain, query_mask=mask.contiguous(), reduction=reduction, backend="cpu")
        assert torch.equal(got, expected)
    anchors, references = index_list(60, 60, 3).T[:, ::2], index_list(1, 60, 9).expand(3, 9)
    got = tp.contrastive_scores(features, anchors, references, backend="cpu")
    assert torch.equal(
        got, tp.contrastive_scores(plain[0], anchors.contiguous(), references.contiguous(), backend="cpu")
    )


@compiled
@over_dtypes
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    features, queries = torch.randn(2, 300, 700).to(dtype), torch.randn(2, 45, 700).to(dtype)
    anchors, references = index_list(2, 300, 70), index_list(2, 300, 200)

    def results() -> list[Tensor]:
        scores = [tp.cosine_scores(features, queries, reduction=r) for r in REDUCTIONS]
        return [*scores, tp.contrastive_scores(features, anchors, references)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        shared = results()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


# --- paired_cosine ----------------------------------------------------------------------------------------------------

PAIRED_BACKENDS = backends_of("paired_cosine")
over_paired = pytest.mark.parametrize("backend", PAIRED_BACKENDS)


def literal_pairs(a: Tensor, b: Tensor) -> Tensor:
    """The formula in float64 and plain loops, of the code's own references independent."""
    x, y = a.double().numpy(), b.double().numpy()
    scores = np.zeros(x.shape[:2])
    for s in range(x.shape[0]):
        for i in range(x.shape[1]):
            norms = [max(math.sqrt(sum(float(e) ** 2 for e in row)), 1e-12) for row in (x[s, i], y[s, i])]
            scores[s, i] = sum(float(e) * float(f) for e, f in zip(x[s, i], y[s, i], strict=True)) / norms[0] / norms[1]
    return torch.from_numpy(scores)


@over_paired
@over_dtypes
@pytest.mark.parametrize("channels", [1, 7, 72, 80, 515])
def test_paired_cosine(backend: str, dtype: torch.dtype, channels: int) -> None:
    for batch, n in [(2, 13), (1, 1), (3, 5)]:
        a, b = torch.randn(batch, n, channels).to(dtype), torch.randn(batch, n, channels).to(dtype)
        got = tp.paired_cosine(a, b, backend=backend)
        assert_as_good_as_torch(got, literal_pairs(a, b), reference.paired_cosine(a, b))


@over_paired
@over_dtypes
def test_a_list_against_itself_is_one_exactly_where_norms_are_exact(backend: str, dtype: torch.dtype) -> None:
    rows = ternary(2, 70, 96).to(dtype)
    ones = torch.ones(2, 70, dtype=torch.float64)
    assert torch.equal(tp.paired_cosine(rows, rows, backend=backend).double(), ones)
    assert torch.equal(tp.paired_cosine(rows, -rows * 4, backend=backend).double(), -ones)
    assert tp.paired_cosine(rows, torch.zeros_like(rows), backend=backend).eq(0).all()


@over_paired
@over_dtypes
def test_one_frame_later_as_views_of_one_video(backend: str, dtype: torch.dtype) -> None:
    """Also with the channels of the frames next to each other, where no dimension but the last is contiguous."""
    video = torch.randn(6, 10, 33).to(dtype)
    for view in (video, video.transpose(0, 1).contiguous().transpose(0, 1), video.flip(0)):
        got = tp.paired_cosine(view[1:], view[:-1], backend=backend)
        exact = literal_pairs(view[1:], view[:-1])
        assert_as_good_as_torch(got, exact, reference.paired_cosine(view[1:], view[:-1]))


@compiled
def test_strided_tokens_are_not_copied() -> None:
    """A million tokens of stride 0: the result is the largest tensor that is made."""
    a, b = (torch.randn(1, 1, 64).expand(1, 2**20, 64) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        got = tp.paired_cosine(a, b, backend="cpu")
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= got.numel() * got.element_size()
    assert torch.equal(got, got[:, :1].expand_as(got))


@over_paired
@pytest.mark.parametrize("special", [0.0, -0.0, NAN, INF, -INF, 1e30, 1e-30])
def test_special_values_in_pairs(backend: str, special: float) -> None:
    # 1e30: the squares overflow in float32, so the unit vector is 0; 1e-30: below the floor of the norm.
    for filled in (slice(None), slice(0, 1)):
        a, b = torch.randn(2, 20, 24), torch.randn(2, 20, 24)
        a[:, ::7, filled] = special
        b[:, ::3, filled] = special
        for x, y in ((a, b), (b, a)):
            got = tp.paired_cosine(x, y, backend=backend)
            expected = reference.paired_cosine(x, y)
            torch.testing.assert_close(got, expected, rtol=0, atol=16 * 2**-23, equal_nan=True)


@settings(deadline=None, max_examples=40, print_blob=True)
@given(
    st.integers(0, 3), st.integers(0, 40), st.integers(0, 300),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.integers(0, 2**31),
)  # fmt: skip
def test_random_pairs(batch: int, n: int, channels: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(batch, n, channels).to(dtype), torch.randn(batch, n, channels).to(dtype)
    for backend in PAIRED_BACKENDS:
        if dtype in dtypes_of(backend):
            got = tp.paired_cosine(a, b, backend=backend)
            assert_as_good_as_torch(got, literal_pairs(a, b), reference.paired_cosine(a, b))


PER_CAPABILITY = """
import json, torch
import tokenprune_kernels as tp
from testing.cases import DTYPES, assert_as_good_as_torch
from tests.ops.test_similarity import (
    REDUCTIONS, check_contrastive, check_cosine, index_list, literal_pairs, reference,
)
torch.manual_seed(0)
for dtype in DTYPES:
    for channels in (1, 72, 270):
        for m in (1, 5, 10, 33):
            features, queries = torch.randn(2, 59, channels).to(dtype), torch.randn(2, m, channels).to(dtype)
            for reduction in REDUCTIONS:
                check_cosine(features, queries, torch.rand(2, m) < 0.9, reduction, "cpu")
            check_contrastive(features, index_list(2, 59, m), index_list(2, 59, m), "cpu")
        a, b = torch.randn(2, 9, channels).to(dtype), torch.randn(2, 9, channels).to(dtype)
        got = tp.paired_cosine(a, b, backend="cpu")
        assert_as_good_as_torch(got, literal_pairs(a, b), reference.paired_cosine(a, b))
print("done")
"""


@compiled
@over_capabilities
def test_every_cpu_capability(capability: str) -> None:
    assert run_with_capability(capability, PER_CAPABILITY) == ["done"]
