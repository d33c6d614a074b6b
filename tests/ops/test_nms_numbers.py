"""spatial_semantic_nms on numbers that are none, huge or tiny, and of several dtypes."""

import itertools

import pytest
import torch

import tokenprune_kernels as tp
from testing.cases import BACKENDS, GPU_BACKENDS, dtypes_of, over_backends, over_dtypes
from tests.ops.test_nms import INF, NAN, grid, one_hot, reference


@over_backends
@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("special", [0.0, NAN, INF, -INF, 1e30, 1e-30])
def test_special_feature_values(backend: str, mode: str, special: float) -> None:
    # 1e30: the squares overflow, so the unit vector is 0; 1e-30: below the floor of the norm, so nearly 0.
    for filled in (slice(None), slice(0, 1)):
        scores, features, positions = torch.rand(2, 36), one_hot(2, 36, 8, 2), grid(6, 6, 2)
        features[:, ::5, filled] = special
        options = {"radius": 1.5, "sigma_semantic": 0.5, "mode": mode, "threshold": 0.05}
        expected = reference(scores, features, positions, 36, **options)
        got = tp.spatial_semantic_nms(scores, features, positions, 36, backend=backend, **options)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=4e-6, atol=0, equal_nan=True)


@over_backends
def test_nan_weights_send_a_token_to_the_end(backend: str) -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    features = torch.tensor([[[1.0], [NAN], [1.0], [1.0]]])
    positions = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 9.0]]])
    indices, selected, _ = tp.spatial_semantic_nms(scores, features, positions, 4, backend=backend)
    assert indices.tolist() == [[0, 2, 3, 1]]
    assert selected[0, 3].isnan()


@over_backends
def test_positions_that_are_not_numbers_are_near_nothing(backend: str) -> None:
    positions = torch.tensor([[[0.0, 0.0], [NAN, 0.0], [INF, 0.0], [0.0, 0.0]]])
    indices, selected, _ = tp.spatial_semantic_nms(
        torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.ones(1, 4, 2), positions, 4, backend=backend
    )
    assert indices.tolist() == [[0, 1, 2, 3]]
    assert selected.tolist() == [[4.0, 3.0, 2.0, 0.0]]


@over_backends
@over_dtypes
def test_huge_and_tiny_sigmas(backend: str, dtype: torch.dtype) -> None:
    # 2 sigma^2 overflows to inf, as an infinite sigma does, or underflows: then only an exact match has weight.
    inputs = torch.rand(1, 25).to(dtype), one_hot(1, 25, 4, 2).to(dtype), grid(5, 5).to(dtype)
    for sigma, same_as in [(1e200, INF), (1e-8, 0.01)]:
        for name in ("sigma_spatial", "sigma_semantic"):
            expected = reference(*inputs, 25, **{name: same_as})
            got = tp.spatial_semantic_nms(*inputs, 25, backend=backend, **{name: sigma})
            assert torch.equal(got[0], expected[0])
            torch.testing.assert_close(got[1], expected[1], rtol=4e-6, atol=0)


@over_backends
def test_dtypes_may_differ(backend: str) -> None:
    scores, features, positions = torch.rand(2, 30), one_hot(2, 30, 6, 3), grid(5, 6, 2)
    for dtypes in itertools.product(dtypes_of(backend), repeat=3):
        args = [t.to(dtype) for t, dtype in zip((scores, features, positions), dtypes, strict=True)]
        got = tp.spatial_semantic_nms(*args, 30, sigma_spatial=INF, backend=backend)
        expected = reference(args[0].double(), *args[1:], 30, sigma_spatial=INF)
        assert torch.equal(got[0], expected[0])
        assert got[1].dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)
        torch.testing.assert_close(got[1].double(), expected[1], rtol=0, atol=0)


def test_float64_positions_keep_their_precision() -> None:
    # A gap that float32 would round away: with it the second token lies outside the radius.
    positions = torch.tensor([[[0.0, 0.0], [0.0, 1.0 + 1e-12]]], dtype=torch.float64)
    for backend in set(BACKENDS) - set(GPU_BACKENDS):
        _, selected, _ = tp.spatial_semantic_nms(
            torch.tensor([[2.0, 1.0]]), torch.ones(1, 2, 3), positions, 2, radius=1.0, backend=backend
        )
        assert selected.tolist() == [[2.0, 1.0]]
