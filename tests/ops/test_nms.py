"""spatial_semantic_nms: against the float64 reference, against its special cases, and on the edges of its domain."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import (
    BACKENDS,
    compiled,
    dtypes_of,
    over_backends,
    over_capabilities,
    over_dtypes,
    run_with_capability,
)

INF, NAN = math.inf, math.nan
reference = tp.reference.spatial_semantic_nms


def grid(height: int, width: int, batch: int = 1) -> Tensor:
    """(row, column) of every token, [B, height * width, 2]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns], -1).reshape(1, -1, 2).expand(batch, -1, -1).float()


def one_hot(batch: int, n: int, channels: int, kinds: int) -> Tensor:
    """Features whose cosines are exactly 0 or 1, some of them scaled by a power of two."""
    hot = torch.zeros(batch, n, channels).scatter_(2, torch.randint(0, min(kinds, channels), (batch, n, 1)), 1.0)
    return hot * 2.0 ** torch.randint(-3, 4, (batch, n, 1))


def clustered(batch: int, n: int, channels: int, noise: float = 0.2) -> Tensor:
    """Features in a few bundles: cosines inside a bundle are near 1, where the semantic factor is steep."""
    centre = torch.randn(batch, 1 + n // 8, channels)
    return centre[:, torch.arange(n) // 8] + noise * torch.randn(batch, n, channels)


def replay(scores: Tensor, features: Tensor, positions: Tensor, indices: Tensor, **options: Any) -> tuple[float, float]:
    """One sample in float64, each step given the picks before it.

    Returns the largest amount by which a pick falls short of the best candidate, and the values at selection.
    """
    s, f, p = scores.double().clone(), torch.nn.functional.normalize(features.double(), dim=-1), positions.double()
    radius, spatial = options.get("radius", 5.0), options.get("sigma_spatial", 1.5)
    semantic, groups = options.get("sigma_semantic", 0.05), options.get("groups")
    available = torch.ones_like(s, dtype=torch.bool)
    shortfall, values = 0.0, []
    for pick in indices.tolist():
        assert available[pick]
        shortfall = max(shortfall, (s[available].max() - s[pick]).item())
        values.append(s[pick].item())
        d2 = (p - p[pick]).square().sum(-1)
        w = torch.exp(-d2 / (2 * spatial**2) - (1 - f @ f[pick]) ** 2 / (2 * semantic**2))
        near = d2.sqrt() <= radius
        if groups is not None:
            near &= groups == groups[pick]
        s = torch.where(near, s * (1 - w), s)
        available[pick] = False
    return shortfall, torch.tensor(values, dtype=torch.float64)


def error_of(result: tuple[Tensor, Tensor, Tensor], *inputs: Tensor, **options: Any) -> tuple[float, float]:
    """(shortfall of the picks, error of selected_scores) of a batched result, from the float64 replay."""
    worst, error = 0.0, 0.0
    for b in range(result[0].shape[0]):
        own = {key: value[b] if isinstance(value, Tensor) else value for key, value in options.items()}
        shortfall, values = replay(*(t[b] for t in inputs), result[0][b, : result[2][b]], **own)
        worst = max(worst, shortfall)
        error = max(error, (result[1][b, : result[2][b]].double() - values).abs().max().item())
    return worst, error


@over_backends
@over_dtypes
@pytest.mark.parametrize("channels", [1, 16, 72, 80, 133])
def test_every_pick_is_the_best_in_float64(backend: str, dtype: torch.dtype, channels: int) -> None:
    batch, side, k = 2, 9, 60
    inputs = (
        torch.rand(batch, side * side).to(dtype),
        clustered(batch, side * side, channels).to(dtype),
        grid(side, side, batch).to(dtype),
    )
    got = tp.spatial_semantic_nms(*inputs, k, backend=backend)
    _, plain_error = error_of(reference(*inputs, k), *inputs)
    shortfall, error = error_of(got, *inputs)
    # Twice the error of plain PyTorch in the same dtype, and 16 roundings for cases where that happens to be exact.
    allowed = 2 * plain_error + 16 * torch.finfo(got[1].dtype).eps
    assert error <= allowed
    assert shortfall <= 2 * allowed  # the pick and the best candidate may both be off by `allowed`


@pytest.mark.parametrize("mode", ["soft", "hard"])
@over_dtypes
@over_backends
def test_exactly_representable_inputs_give_identical_indices(backend: str, dtype: torch.dtype, mode: str) -> None:
    # Cosines are 0 or 1 and the spatial factor is 1, so every weight is 1 or rounds to 0 in each dtype.
    options = {"sigma_spatial": INF, "mode": mode, "radius": 2.0}
    for batch, height, width, channels, k in [(2, 6, 7, 8, 30), (1, 1, 1, 1, 1), (3, 5, 5, 3, 40), (1, 24, 24, 64, 57)]:
        n = height * width
        scores = torch.randint(-6, 60, (batch, n)).float() / 8
        features, positions = one_hot(batch, n, channels, 3), grid(height, width, batch)
        groups, mask = torch.randint(0, 2, (batch, n)), torch.rand(batch, n) < 0.9
        exact = reference(scores.double(), features, positions, k, groups=groups, mask=mask, **options)
        got = tp.spatial_semantic_nms(
            scores.to(dtype), features.to(dtype), positions.to(dtype), k,
            groups=groups, mask=mask, backend=backend, **options,
        )  # fmt: skip
        assert torch.equal(got[0], exact[0])
        assert torch.equal(got[1].double(), exact[1])
        assert torch.equal(got[2], exact[2])


@settings(deadline=None, max_examples=60, print_blob=True)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 90),
    st.sampled_from([0.0, 1.0, 2.5, 5.0, INF]), st.sampled_from([0.5, 1.5, INF]), st.sampled_from([0.05, 0.5, INF]),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes_and_options(
    batch: int, height: int, width: int, channels: int, k: int, radius: float, spatial: float, semantic: float,
    signed: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    n = height * width
    scores = (torch.randn if signed else torch.rand)(batch, n, dtype=torch.float64)
    features, positions, groups = (
        clustered(batch, n, channels),
        grid(height, width, batch),
        torch.randint(0, 2, (batch, n)),
    )
    options = {"radius": radius, "sigma_spatial": spatial, "sigma_semantic": semantic}
    for backend in BACKENDS:
        dtype = dtypes_of(backend)[-1]
        inputs = (scores.to(dtype), features.to(dtype), positions.to(dtype))
        expected = reference(*inputs, k, groups=groups, **options)
        got = tp.spatial_semantic_nms(*inputs, k, groups=groups, backend=backend, **options)
        assert torch.equal(got[2], expected[2])
        assert got[2].eq(min(k, n)).all()
        if min(k, n):
            _, plain_error = error_of(expected, *inputs, groups=groups, **options)
            shortfall, error = error_of(got, *inputs, groups=groups, **options)
            allowed = 2 * plain_error + 16 * torch.finfo(dtype).eps * scores.abs().max().item()
            assert error <= allowed
            assert shortfall <= 2 * allowed


@over_backends
@over_dtypes
def test_radius_below_one_is_plain_topk(backend: str, dtype: torch.dtype) -> None:
    scores = torch.randn(3, 49).to(dtype)
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    features = torch.ones(3, 49, 5).to(dtype)
    indices, selected, counts = tp.spatial_semantic_nms(
        scores, features, grid(7, 7, 3).to(dtype), 20, radius=0.9, backend=backend
    )
    assert torch.equal(indices, order[:, :20])
    assert torch.equal(selected, values[:, :20].to(selected.dtype))
    assert counts.tolist() == [20, 20, 20]


@over_backends
def test_without_semantics_it_is_gaussian_soft_nms(backend: str) -> None:
    dtype = dtypes_of(backend)[-1]
    scores = torch.rand(1, 70, dtype=torch.float64).to(dtype)
    positions = 10 * torch.rand(1, 70, 2, dtype=torch.float64).to(dtype)
    indices, selected, _ = tp.spatial_semantic_nms(
        scores, torch.randn(1, 70, 6), positions, 70,
        radius=INF, sigma_spatial=2.0, sigma_semantic=INF, backend=backend,
    )  # fmt: skip
    s, p = scores[0].double().numpy().copy(), positions[0].double().numpy()
    for step in range(70):
        m = int(s.argmax())
        assert indices[0, step] == m
        np.testing.assert_allclose(selected[0, step].item(), s[m], rtol=0, atol=70 * torch.finfo(dtype).eps)
        s *= 1 - np.exp(-((p - p[m]) ** 2).sum(-1) / (2 * 2.0**2))
        s[m] = -np.inf


@over_backends
def test_groups_never_interact(backend: str) -> None:
    batch, n = 2, 64
    scores, features, positions = torch.rand(batch, n), clustered(batch, n, 12), grid(8, 8, batch)
    groups = torch.randint(-(2**40), 2**40, (4,))[torch.randint(0, 4, (batch, n))]
    together = tp.spatial_semantic_nms(scores, features, positions, n, groups=groups, backend=backend)
    for value in groups.unique():
        alone = tp.spatial_semantic_nms(scores, features, positions, n, mask=groups == value, backend=backend)
        for b in range(batch):
            of_group = groups[b, together[0][b]] == value
            assert torch.equal(together[0][b, of_group], alone[0][b, : alone[2][b]])
            assert torch.equal(together[1][b, of_group], alone[1][b, : alone[2][b]])


@over_backends
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_hard_mode_drops_exactly_what_a_pick_outweighs(backend: str, threshold: float) -> None:
    n, dtype = 100, dtypes_of(backend)[-1]
    scores, positions, features = torch.rand(1, n).to(dtype), grid(10, 10).to(dtype), clustered(1, n, 16).to(dtype)
    options = {"radius": 3.0, "sigma_spatial": 1.5, "sigma_semantic": 0.1}
    picked, selected, counts = tp.spatial_semantic_nms(
        scores, features, positions, n, mode="hard", threshold=threshold, backend=backend, **options
    )
    kept = picked[0, : counts[0]]
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    distance = torch.cdist(positions[0].double(), positions[0].double())
    w = torch.exp(-(distance**2) / (2 * 1.5**2) - (1 - unit @ unit.T) ** 2 / (2 * 0.1**2))
    outweighs = (w >= threshold) & (distance <= 3.0) & ~torch.eye(n, dtype=torch.bool)
    assert 0 < counts[0] < n
    assert not outweighs[kept][:, kept].any()
    dropped = torch.ones(n, dtype=torch.bool).index_fill(0, kept, False)
    stronger = scores[0].unsqueeze(1) > scores[0].unsqueeze(0)  # a token is dropped by a better pick
    assert (outweighs & stronger)[kept][:, dropped].any(0).all()
    assert torch.equal(selected[0, : counts[0]], scores[0, kept])
    assert torch.equal(kept, kept[scores[0, kept].argsort(descending=True)])
    assert (picked[0, counts[0] :] == -1).all()
    assert (selected[0, counts[0] :] == 0).all()


@over_backends
@pytest.mark.parametrize(("threshold", "expected"), [(1.5, [0, 1, 2, 3]), (-INF, [0, 3, -1, -1]), (INF, [0, 1, 2, 3])])
def test_hard_mode_at_extreme_thresholds(backend: str, threshold: float, expected: list[int]) -> None:
    scores, positions = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[[0.0, 0], [0, 0], [0, 1], [0, 2]]])
    indices, _, _ = tp.spatial_semantic_nms(
        scores, torch.ones(1, 4, 2), positions, 4, mode="hard", threshold=threshold, radius=1.0, backend=backend
    )
    assert indices.tolist() == [expected]


@over_backends
@over_dtypes
def test_order_of_candidates(backend: str, dtype: torch.dtype) -> None:
    # Better first; ties, also -0.0 and 0.0, by lower index; infinities are numbers; NaN after all of them.
    scores = torch.tensor([[0.0, NAN, -INF, 2.0, -0.0, INF, 2.0, NAN, -1.0, 0.0]]).to(dtype)
    indices, selected, counts = tp.spatial_semantic_nms(
        scores, torch.ones(1, 10, 3).to(dtype), grid(1, 10).to(dtype), 12, radius=0.5, backend=backend
    )
    assert indices.tolist() == [[5, 3, 6, 0, 4, 9, 8, 2, 1, 7, -1, -1]]
    expected = scores[:, [5, 3, 6, 0, 4, 9, 8, 2, 1, 7]].to(selected.dtype)
    torch.testing.assert_close(selected[:, :10], expected, rtol=0, atol=0, equal_nan=True)
    assert counts.tolist() == [10]


@over_backends
def test_suppression_raises_negative_scores(backend: str) -> None:
    # -4 and -2 are exact duplicates of the first pick and become -0, better than the untouched -1.
    scores = torch.tensor([[-0.5, -4.0, -1.0, -2.0]])
    features = torch.tensor([[[1.0, 0], [2.0, 0], [0, 1.0], [1.0, 0]]])
    indices, selected, _ = tp.spatial_semantic_nms(
        scores, features, torch.zeros(1, 4, 2), 4, sigma_spatial=INF, backend=backend
    )
    assert indices.tolist() == [[0, 1, 3, 2]]
    assert selected.tolist() == [[-0.5, 0.0, 0.0, -1.0]]


@over_backends
def test_mask_and_budget(backend: str) -> None:
    scores, features, positions = torch.rand(3, 20), torch.randn(3, 20, 4), grid(4, 5, 3)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[1, [3, 17]] = True
    mask[2] = True
    indices, selected, counts = tp.spatial_semantic_nms(
        scores, features, positions, 25, mask=mask, radius=0.5, backend=backend
    )
    assert counts.tolist() == [0, 2, 20]
    assert (indices[0] == -1).all()
    assert sorted(indices[1, :2].tolist()) == [3, 17]
    assert sorted(indices[2, :20].tolist()) == list(range(20))
    padding = torch.arange(25) >= counts.unsqueeze(1)
    assert (indices[padding] == -1).all()
    assert (selected[padding] == 0).all()
    assert tp.spatial_semantic_nms(scores, features, positions, 0, backend=backend)[0].shape == (3, 0)


@over_backends
@over_dtypes
def test_masked_tokens_do_not_matter(backend: str, dtype: torch.dtype) -> None:
    scores, features, positions = torch.rand(1, 30).to(dtype), clustered(1, 30, 8).to(dtype), grid(5, 6).to(dtype)
    mask = torch.rand(1, 30) < 0.6
    expected = tp.spatial_semantic_nms(scores, features, positions, 30, mask=mask, backend=backend)
    hidden = ~mask
    scores[hidden], features[hidden], positions[hidden] = INF, NAN, NAN
    got = tp.spatial_semantic_nms(scores, features, positions, 30, mask=mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@compiled
def test_strided_inputs() -> None:
    scores, features = torch.rand(60, 2).T[:, ::2], torch.randn(2, 30, 14)[..., ::2]
    positions = torch.rand(2, 2, 30).mT * 6
    mask, groups = (torch.rand(30, 2) < 0.8).T, torch.randint(0, 2, (1, 30)).expand(2, 30)
    plain = [t.contiguous() for t in (scores, features, positions)]
    got = tp.spatial_semantic_nms(scores, features, positions, 30, mask=mask, groups=groups, backend="cpu")
    expected = tp.spatial_semantic_nms(*plain, 30, mask=mask.contiguous(), groups=groups.contiguous(), backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@compiled
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    scores, features, positions = torch.rand(7, 576), clustered(7, 576, 256), grid(24, 24, 7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = tp.spatial_semantic_nms(scores, features, positions, 100, backend="cpu")
        torch.set_num_threads(3)
        shared = tp.spatial_semantic_nms(scores, features, positions, 100, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


PER_CAPABILITY = """
import json, torch, tokenprune_kernels as tp
from testing.cases import DTYPES
from tests.ops.test_nms import clustered, error_of, grid, reference
torch.manual_seed(0)
report = []
for dtype in DTYPES:
    for channels in (1, 31, 72, 80, 257):
        inputs = (torch.rand(1, 81).to(dtype), clustered(1, 81, channels).to(dtype), grid(9, 9).to(dtype))
        got = tp.spatial_semantic_nms(*inputs, 60, backend="cpu")
        shortfall, error = error_of(got, *inputs)
        allowed = 2 * error_of(reference(*inputs, 60), *inputs)[1] + 16 * torch.finfo(got[1].dtype).eps
        report.append([str(dtype), channels, error / allowed, shortfall / allowed])
print(json.dumps(report))
"""


@compiled
@over_capabilities
def test_every_cpu_capability(capability: str) -> None:
    (line,) = run_with_capability(capability, PER_CAPABILITY)
    for dtype, channels, error, shortfall in json.loads(line):
        assert error <= 1, (dtype, channels)
        assert shortfall <= 2, (dtype, channels)
