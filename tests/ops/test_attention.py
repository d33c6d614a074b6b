"""The attention ops against the reference in float64, and what is special to them: masks, reductions, edge values.

Tolerance (testing/cases.py): the error is at most twice that of the reference run on the inputs as they are, plus 16
units in the last place of the largest value times the largest log-sum-exp: the rounding of a logit, which grows with
the logit, is the relative error of its probability. The sums over dimension, keys and heads are ordered differently.
"""

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import (
    GPU_BACKENDS,
    assert_as_good_as_torch,
    compiled,
    over_backends,
    over_capabilities,
    over_dtypes,
    run_with_capability,
)
from testing.process import printed

INF = math.inf
HEADS = ("mean", "sum", "max", "none")
NAMES = ("scores", "entropy", "lse")


def inputs(
    batch: int, heads: int, key_heads: int, rows: int, keys: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, rows, dim).to(dtype), torch.randn(batch, key_heads, keys, dim).to(dtype)


def largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return max(1.0, float(finite.abs().max())) if finite.numel() else 1.0


def check(backend: str, query: Tensor, key: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """All three ops on one set of arguments, compared with the float64 reference; returns what the first one gave."""
    softmax = {k: v for k, v in options.items() if k not in ("key_indices", "query_mask")}
    softmax = {k: v for k, v in softmax.items() if not k.endswith("_reduction")}
    with tp.use_backend(backend):
        got = tp.cross_attention_scores(query, key, **options)
        entropy, lse = tp.attention_entropy(query, key, **softmax)
        given = tp.attention_scores(query, key, got[2], **options)
    exact = tp.reference.cross_attention_scores(query.double(), key.double(), **options)
    plain = tp.reference.cross_attention_scores(query, key, **options)
    logit = largest(exact[2])
    for name, *values in zip(
        (*NAMES, "entropy alone", "lse alone", "scores given"),
        (*got, entropy, lse, given),
        (*exact, *exact[1:], exact[0]),
        (*plain, *plain[1:], plain[0]),
        strict=True,
    ):
        try:
            assert_as_good_as_torch(*values, scale=largest(values[1]) * (logit if "lse" not in name else 1))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return got


@over_backends
@over_dtypes
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (14, 2), (1, 1)])
@pytest.mark.parametrize("rows", [1, 6, 21, 64])
def test_accuracy(backend: str, dtype: torch.dtype, heads: int, key_heads: int, rows: int) -> None:
    batch, keys = (1, 80) if backend == "triton" else (2, 150)  # the interpreter is slow
    check(backend, *inputs(batch, heads, key_heads, rows, keys, 64, dtype))


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 15, 17, 72, 80, 96, 255, 256, 257, 520])
@pytest.mark.parametrize("rows", [1, 9])
def test_dimensions(dim: int, rows: int) -> None:
    check("auto", *inputs(1, 2, 1, rows, 40, dim), cosine=dim % 2 == 0)


@pytest.mark.parametrize("keys", [1, 3, 4, 11, 12, 13, 16, 95, 96, 97, 192, 200])
@pytest.mark.parametrize("rows", [3, 4, 5, 17])  # 2 heads: on both sides of the change of layout
def test_number_of_keys(keys: int, rows: int) -> None:
    check("auto", *inputs(1, 2, 1, rows, keys, 20), query_reduction="mean+max")


@over_backends
@over_dtypes
def test_text_embeddings_by_cosine(backend: str, dtype: torch.dtype) -> None:
    """AdaFV: one head of the model's width, softmax of 100 times the cosine, maximum over text rows."""
    query, key = inputs(1, 1, 1, 20, 60, 1024 if backend == "triton" else 4096, dtype)  # the interpreter is slow
    check(backend, query, key, cosine=True, scale=100.0, query_reduction="max")


@over_backends
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", [2, 40])
def test_every_reduction_at_once_is_each_alone(backend: str, heads: str, rows: int) -> None:
    query, key = inputs(2, 6, 2, rows, 50, 16)
    mask = torch.rand(2, rows) < 0.6
    mask[1] = False
    options: dict[str, Any] = {"head_reduction": heads, "query_mask": mask}
    together, _, _ = check(backend, query, key, query_reduction="last+mean+max+sum+mean", **options)
    assert together.shape == ((2, 5, 6, 50) if heads == "none" else (2, 5, 50))
    for i, rows_reduction in enumerate(("last", "mean", "max", "sum", "mean")):
        alone, _, _ = check(backend, query, key, query_reduction=rows_reduction, **options)
        assert torch.equal(alone, together[:, i])
    assert (together[1] == 0).all()


@over_backends
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(20, 4), (70, 70), (130, 66)])
def test_rows_count_whatever_columns_there_are(backend: str, rows: int, keys: int, causal: bool) -> None:
    """More rows with a query_mask than a tile of keys has columns with a key."""
    query, key = inputs(2, 2, 1, rows, keys, 16)
    options: dict[str, Any] = {"query_mask": torch.rand(2, rows) < 0.8, "causal": causal, "query_reduction": "sum+last"}
    check(backend, query, key, **options)
    check(backend, query, key, **options, key_mask=torch.arange(keys).expand(2, -1) % 3 == 0)


@over_backends
def test_heads_are_reduced_before_rows(backend: str) -> None:
    """Head 0 looks at key 0 in row 0, head 1 at key 1 in row 1: the maximum over rows of the mean over heads is 1/2."""
    query = torch.tensor([[[[1.0, 0], [0, 0]], [[0, 0], [0, 1.0]]]]) * 1e4
    key = torch.eye(2).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    scores = tp.cross_attention_scores(query, key, scale=1.0, query_reduction="max", backend=backend)[0]
    torch.testing.assert_close(scores, torch.tensor([[0.75, 0.75]]))
    scores = tp.cross_attention_scores(
        query, key, scale=1.0, head_reduction="max", query_reduction="mean", backend=backend
    )[0]
    torch.testing.assert_close(scores, torch.tensor([[0.75, 0.75]]))


@over_backends
@pytest.mark.parametrize("rows", [1, 30])
def test_causal_and_masked(backend: str, rows: int) -> None:
    query, key = inputs(2, 4, 2, rows, 120, 24)
    key_mask = torch.rand(2, 120) < 0.5
    key_mask[1, :100] = False  # one whole chunk of keys is hidden
    check(backend, query, key, causal=True)
    check(backend, query, key, causal=True, key_mask=key_mask)
    positions = torch.randint(-3, 125, (2, rows))
    positions[0, 0] = torch.iinfo(torch.int64).max
    positions[1, 0] = torch.iinfo(torch.int64).min
    check(backend, query, key, causal=True, query_positions=positions, query_reduction="last+max")


@over_backends
@pytest.mark.parametrize("rows", [2, 20])
def test_rows_that_see_nothing(backend: str, rows: int) -> None:
    query, key = inputs(2, 2, 2, rows, 30, 8)
    key_mask = torch.ones(2, 30, dtype=torch.bool)
    key_mask[0] = False
    scores, entropy, lse = check(backend, query, key, key_mask=key_mask)
    assert (scores[0] == 0).all()
    assert (entropy[0] == 0).all()
    assert (lse[0] == -INF).all()
    key_mask[0] = True
    positions = torch.arange(rows).expand(2, rows) - 1  # row 0 sees nothing
    _, entropy, lse = check(backend, query, key, causal=True, query_positions=positions)
    assert (lse[:, :, 0] == -INF).all()
    assert (entropy[:, :, 1] == 0).all()  # one visible key: no uncertainty


@over_backends
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("where", ["query", "key", "hidden key"])
def test_non_finite_values_go_where_the_reference_puts_them(backend: str, rows: int, value: float, where: str) -> None:
    query, key = inputs(1, 2, 1, rows, 130, 8)
    key_mask = torch.ones(1, 130, dtype=torch.bool)
    key_mask[0, [5, 100]] = False
    if where == "query":
        query[0, 1, 0, 3] = value
    else:
        key[0, 0, 7 if where == "key" else 5, 3] = value
    options: dict[str, Any] = {"key_mask": key_mask, "head_reduction": "none", "query_reduction": "max+sum"}
    scores, _, _ = check(backend, query, key, **options)
    assert (scores[..., [5, 100]] == 0).all()
    if where == "hidden key":
        assert scores.isfinite().all()


@over_backends
@pytest.mark.parametrize("rows", [1, 20])
def test_given_lse(backend: str, rows: int) -> None:
    query, key = inputs(1, 2, 1, rows, 50, 8)
    lse = tp.reference.attention_entropy(query, key)[1]
    scores = tp.attention_scores(query, key, lse, query_reduction="sum", head_reduction="sum", backend=backend)
    torch.testing.assert_close(scores.sum(), torch.tensor(2.0 * rows))
    half = tp.attention_scores(
        query, key, lse + math.log(2), query_reduction="sum", head_reduction="sum", backend=backend
    )
    torch.testing.assert_close(half, scores / 2)
    for dtype in (torch.float64, torch.float16):
        rounded = lse.to(dtype)
        exact = tp.reference.attention_scores(query.double(), key.double(), rounded.double())
        plain = tp.reference.attention_scores(query, key, rounded)
        assert_as_good_as_torch(tp.attention_scores(query, key, rounded, backend=backend), exact, plain)
    lse[0, 0] = -INF
    lse[0, 1] = INF
    assert (tp.attention_scores(query, key, lse, backend=backend) == 0).all()
    lse[0, 1, 0] = math.nan
    assert tp.attention_scores(query, key, lse, backend=backend).isnan().all()


@over_backends
@pytest.mark.parametrize("rows", [1, 16])
def test_exponential(backend: str, rows: int) -> None:
    """With D = 1 and lse = 0 the score of a key is exp(key), 0 and inf outside.

    Within 2 units in the last place; CUDA computes 2^(key log2(e)) and rounds the exponent, 2^-24 + 2^-26 of it.
    """
    count = 1501 if backend == "triton" else 20001  # the interpreter is slow
    x = torch.cat((torch.linspace(-87.2, 88.7, count), torch.linspace(-1e-3, 1e-3, 101)))
    query, lse = torch.ones(1, 1, rows, 1), torch.zeros(1, 1, rows)
    options: dict[str, Any] = {"scale": 1.0, "query_reduction": "last", "backend": backend}
    got = tp.attention_scores(query, x.view(1, 1, -1, 1), lse, **options)[0].double()
    exact = x.double().exp()
    ulp = torch.nextafter(exact.float(), torch.tensor(INF)).double() - exact.float().double()
    of_exponent = x.double().abs() * exact * (2**-24 + 2**-26) if backend in ("cuda", "emulator") else 0
    assert (((got - exact).abs() - of_exponent) / ulp).max() <= 2
    x = torch.tensor([-INF, -1e30, -120.0, 0.0, 88.8, 1e30, INF, math.nan])
    got = tp.attention_scores(query, x.view(1, 1, -1, 1), lse, **options)[0]
    expected = torch.tensor([0, 0, 0, 1.0, INF, INF, INF, math.nan])
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)


@over_backends
def test_huge_logits(backend: str) -> None:
    """Logits beyond the range of exp: the maximum is taken out first, so the largest key takes all."""
    query, key = torch.full((1, 1, 9, 1), 200.0), torch.arange(200.0).view(1, 1, 200, 1)
    scores, entropy, lse = tp.cross_attention_scores(query, key, scale=1.0, backend=backend)
    assert torch.equal(scores[0], torch.eye(200)[199])
    assert (entropy == 0).all()
    assert (lse == 39800).all()


@over_backends
@pytest.mark.parametrize("rows", [1, 12])
def test_key_indices(backend: str, rows: int) -> None:
    query, key = inputs(2, 2, 2, rows, 30, 8)
    indices = torch.tensor([[4, -1, 4, 29], [-1, -1, 0, 7]])
    for reduction in ("mean", "max+last"):
        everything = tp.cross_attention_scores(query, key, query_reduction=reduction, backend=backend)[0]
        got = tp.cross_attention_scores(query, key, key_indices=indices, query_reduction=reduction, backend=backend)[0]
        for b in range(2):
            for v, j in enumerate(indices[b].tolist()):
                expected = everything[b, ..., j] if j >= 0 else torch.zeros_like(everything[b, ..., 0])
                assert torch.equal(got[b, ..., v], expected)
    none = tp.cross_attention_scores(query, key, key_indices=indices[:, :0], backend=backend)[0]
    assert none.shape == (2, 0)
    for bad in (-2, 30):
        if backend in GPU_BACKENDS:  # contract section 1: taken as -1
            got = tp.cross_attention_scores(query, key, key_indices=torch.full((2, 1), bad), backend=backend)[0]
            assert (got == 0).all()
            continue
        with pytest.raises(IndexError, match="indices must lie in"):
            tp.cross_attention_scores(query, key, key_indices=torch.full((2, 1), bad), backend=backend)


@over_backends
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)], ids=["B", "H", "M", "N"])
def test_empty(backend: str, shape: tuple[int, int, int, int]) -> None:
    batch, heads, rows, keys = shape
    query, key = inputs(batch, heads, heads, rows, keys, 8)
    for reduction in HEADS:
        scores, entropy, lse = check(backend, query, key, head_reduction=reduction, query_reduction="max+mean")
        assert (scores == 0).all()
        assert (entropy == 0).all()
        assert (lse == -INF).all()
    missing = torch.full((batch, 2), -1)
    assert tp.cross_attention_scores(query, key, key_indices=missing, backend=backend)[0].shape == (batch, 2)


@over_backends
def test_zero_vectors_have_cosine_zero(backend: str) -> None:
    query, key = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 16, 4)
    key[0, 0, 8:, 0] = 3
    _, entropy, lse = tp.cross_attention_scores(query, key, cosine=True, scale=100.0, backend=backend)
    torch.testing.assert_close(lse, torch.full((1, 1, 8), math.log(16)))
    torch.testing.assert_close(entropy, torch.full((1, 1, 8), math.log(16)))
    query[..., 1] = 5
    key[0, 0, 0, 1] = 1e-20  # below the floor of the norm
    scores, _, _ = check(backend, query, key, cosine=True, scale=100.0)
    assert (scores - 1 / 16).abs().max() < 1e-5


@over_backends
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("special", [1e20, -1e30, 3e38, INF, math.nan])
def test_cosines_of_vectors_whose_squares_overflow(backend: str, rows: int, special: float) -> None:
    """Of finite elements the unit vector is 0, wherever the others point; of infinite ones it has a NaN."""
    query, key = inputs(1, 2, 1, rows, 20, 24)
    for turn in (lambda: key[..., 3, :], lambda: query[:, 0, 1], lambda: key[..., 5, ::2]):
        turn().fill_(special)
        for reduction in ("mean", "max"):
            options = {"cosine": True, "scale": 10.0, "head_reduction": reduction}
            got = tp.cross_attention_scores(query, key, backend=backend, **options)
            expected = tp.reference.cross_attention_scores(query, key, **options)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@over_backends
def test_strides(backend: str) -> None:
    """Heads cut out of a fused projection, keys of a longer cache, masks and heads that are expanded."""
    fused = torch.randn(2, 40, 3, 4, 80)  # keys lie 960 elements apart
    query, key = fused[:, 20:, 0].transpose(1, 2), fused[:, :, 1].transpose(1, 2)
    expected = tp.cross_attention_scores(query.contiguous(), key.contiguous(), backend=backend)
    for got, want in zip(tp.cross_attention_scores(query, key, backend=backend), expected, strict=True):
        assert torch.equal(got, want)
    shared = key[:1, :1].expand(2, 4, 40, 80)
    mask = (torch.rand(1, 40) < 0.5).expand(2, 40)
    rows = (torch.rand(1, 20) < 0.5).expand(2, 20)
    expected = tp.cross_attention_scores(
        query, shared.contiguous(), key_mask=mask.contiguous(), query_mask=rows.contiguous(), backend=backend
    )
    got = tp.cross_attention_scores(query, shared, key_mask=mask, query_mask=rows, backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    flipped = query.mT.contiguous().mT  # the last dimension is not contiguous
    torch.testing.assert_close(tp.cross_attention_scores(flipped, key, backend=backend)[1], got_entropy(query, key))


def got_entropy(query: Tensor, key: Tensor) -> Tensor:
    return tp.reference.attention_entropy(query, key)[0]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 32, 32, 64, 576, 32), {}),  # heads are split over work items
        ((1, 28, 4, 300, 500, 16), {"query_reduction": "max+mean"}),  # row blocks are
        ((2, 8, 8, 70, 300, 16), {"head_reduction": "none"}),
        ((1, 32, 8, 1, 4096, 64), {}),  # few rows
        ((1, 1, 1, 50, 200, 1024), {"cosine": True}),
    ],
)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    query, key = inputs(*shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(tp.cross_attention_scores(query, key, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
@over_capabilities
def test_every_instruction_set(capability: str) -> None:
    """In a process each, because the choice is made once."""
    script = """
import torch, tokenprune_kernels as tp
torch.manual_seed(0)
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    for heads, key_heads, rows, keys, dim in ((2, 2, 1, 100, 80), (7, 1, 13, 200, 72), (2, 2, 40, 97, 300)):
        q, k = torch.randn(2, heads, rows, dim).to(dtype), torch.randn(2, key_heads, keys, dim).to(dtype)
        for options in ({}, {"cosine": True, "scale": 20.0, "causal": True, "query_reduction": "max+last"}):
            for got, want in zip(tp.cross_attention_scores(q, k, **options),
                                 tp.reference.cross_attention_scores(q.double(), k.double(), **options)):
                torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
print("done")
"""
    assert run_with_capability(capability, script) == ["done"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of the process from /proc")
@pytest.mark.parametrize("key_heads", [4, 28])
def test_peak_memory(key_heads: int) -> None:
    """At M = 2000, N = 16384, 28 heads plain PyTorch holds 28 * 2000 * 16384 floats; ours adds less than 1% of that."""
    script = f"""
import torch, tokenprune_kernels as tp
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
query, key = torch.randn(1, 28, 2000, 1), torch.randn(1, {key_heads}, 16384, 1)
tp.cross_attention_scores(query[:, :, :100], key[:, :, :64])  # threads and their stacks exist
before = peak()
tp.cross_attention_scores(query, key)
print(peak() - before)
"""
    assert 0 < int(printed("-c", script)) < 0.01 * 28 * 2000 * 16384 * 4
