"""density_peaks: against the contract's words in float64 and plain loops; ties, masks, duplicates, NaN."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import (
    GPU_BACKENDS,
    assert_as_good_as_torch,
    backends_of,
    compiled,
    dtypes_of,
    over_capabilities,
    over_dtypes,
    run_with_capability,
)

NAN, INF = math.nan, math.inf
PEAKS = backends_of("density_peaks")
over_peaks = pytest.mark.parametrize("backend", PEAKS)


def literal(features: Tensor, neighbors: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Density, distance and the value that is ranked, [B, N] in float64, token by token."""
    x = features.double().numpy()
    batch, n, channels = x.shape
    density, distance, value = np.zeros((batch, n)), np.zeros((batch, n)), np.full((batch, n), -INF)
    for b in range(batch):
        valid = [i for i in range(n) if mask is None or mask[b, i]]
        squares = {(i, j): d for i in valid for j, d in enumerate(((x[b, i] - x[b]) ** 2).sum(-1).tolist())}
        squares = {(i, j): d for (i, j), d in squares.items() if j in valid}
        mean = {}
        for i in valid:
            nearest = sorted(squares[i, j] for j in valid if squares[i, j] == squares[i, j])[:neighbors]
            mean[i] = sum(nearest) / (len(nearest) * max(channels, 1)) if nearest else NAN
        widest = max((s for s in squares.values() if s == s), default=0.0)
        for i in valid:
            denser = [j for j in valid if mean[j] < mean[i] or (mean[j] == mean[i] and j < i)]
            near = [squares[i, j] for j in denser if squares[i, j] == squares[i, j]]
            distance[b, i] = math.sqrt((min(near) if near else widest) / max(channels, 1))
            density[b, i] = math.exp(-mean[i])
            value[b, i] = (math.log(distance[b, i]) if distance[b, i] > 0 else -INF) - mean[i]
    return torch.from_numpy(density), torch.from_numpy(distance), torch.from_numpy(value)


def best(value: Tensor, mask: Tensor | None, b: int, k: int) -> list[int]:
    """The k tokens with the largest value: ties by index, NaN behind every number, masked tokens never."""
    tokens = [i for i in range(value.shape[1]) if mask is None or mask[b, i]]
    order = sorted(tokens, key=lambda i: (bool(value[b, i].isnan()), 0 if value[b, i].isnan() else -value[b, i], i))
    return sorted(order[:k])


def check(backend: str, features: Tensor, k: int, neighbors: int = 5, mask: Tensor | None = None) -> Tensor:
    indices, counts, density, distance = tp.density_peaks(features, k, neighbors=neighbors, mask=mask, backend=backend)
    exact_density, exact_distance, value = literal(features, neighbors, mask)
    plain = tp.reference.density_peaks(features, k, neighbors=neighbors, mask=mask)
    scale = features[features.isfinite()].double().abs().max().item() if features.isfinite().any() else 1.0
    assert_as_good_as_torch(density, exact_density, plain[2])
    assert_as_good_as_torch(distance, exact_distance, plain[3], scale=max(scale, 1.0))
    for b in range(features.shape[0]):
        got, want = [i for i in indices[b].tolist() if i >= 0], best(value, mask, b, k)
        assert counts[b] == len(got) == len(want)
        assert indices[b].tolist() == sorted(got) + [-1] * (k - len(got))
        only_got, only_want = sorted(set(got) - set(want)), sorted(set(want) - set(got))
        for i, j in zip(only_got, only_want, strict=True):  # other values whose logarithms round alike
            assert value[b, i] != value[b, j]
            assert math.isclose(value[b, i], value[b, j], rel_tol=1e-6, abs_tol=1e-6)
    return indices


def grid(batch: int, n: int, channels: int, dtype: torch.dtype, high: int = 9) -> Tensor:
    """Small integers: squared distances and their sums are exact, and many of them equal."""
    return torch.randint(0, high, (batch, n, channels)).to(dtype)


@over_peaks
@over_dtypes
@pytest.mark.parametrize("channels", [1, 3, 72, 80])
def test_density_peaks(backend: str, dtype: torch.dtype, channels: int) -> None:
    for batch, n, k, neighbors in [(2, 50, 6, 5), (1, 70, 12, 1), (1, 33, 33, 2), (2, 5, 9, 3)]:
        check(backend, grid(batch, n, channels, dtype), k, neighbors)
        check(backend, grid(batch, n, channels, dtype), k, neighbors, torch.rand(batch, n) < 0.7)


@over_peaks
@over_dtypes
def test_accuracy_of_densities_and_distances(backend: str, dtype: torch.dtype) -> None:
    features = torch.randn(2, 60, 130).to(dtype)
    _, _, density, distance = tp.density_peaks(features, 5, backend=backend)
    exact_density, exact_distance, _ = literal(features, 5, None)
    plain = tp.reference.density_peaks(features, 5)
    assert_as_good_as_torch(density, exact_density, plain[2])
    assert_as_good_as_torch(distance, exact_distance, plain[3], scale=exact_distance.max().item())


@over_peaks
def test_everything_equal(backend: str) -> None:
    """All distances 0: the first tokens, in order, and the densest has the largest distance, which is 0 too."""
    indices, _, density, distance = tp.density_peaks(torch.full((1, 40, 6), 3.25), 4, backend=backend)
    assert indices.tolist() == [[0, 1, 2, 3]]
    assert density.eq(1).all()
    assert distance.eq(0).all()


@over_peaks
@over_dtypes
def test_duplicates_have_distance_zero_and_come_last(backend: str, dtype: torch.dtype) -> None:
    """Also where their squares are no exact numbers: both sides of a distance are summed in one order."""
    single = (torch.randn(1, 30, 70) * 30).to(dtype)
    doubled = torch.cat([single, single, single], 1)[:, torch.randperm(90)]
    indices, counts, density, distance = tp.density_peaks(doubled, 30, neighbors=3, backend=backend)
    assert density.eq(1).all()
    assert (distance == 0).sum() == 60
    assert counts.tolist() == [30]
    assert (distance.gather(1, indices) > 0).all()


@over_peaks
@pytest.mark.parametrize("valid", [0, 1, 2, 4])
def test_fewer_valid_tokens_than_neighbors(backend: str, valid: int) -> None:
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 3 : 3 + valid] = mask[1, 20 - valid :] = True
    indices = check(backend, grid(2, 20, 8, torch.float32), 6, 5, mask)
    assert ((indices >= 0).sum(-1) == valid).all()


@over_peaks
@pytest.mark.parametrize("neighbors", [1, 40, 41, 2**62])
def test_any_number_of_neighbors(backend: str, neighbors: int) -> None:
    check(backend, grid(1, 40, 8, torch.float32), 6, neighbors)


@over_peaks
def test_one_neighbor_is_the_token_itself(backend: str) -> None:
    features = grid(1, 40, 8, torch.float32)
    _, _, density, distance = tp.density_peaks(features, 6, neighbors=1, backend=backend)
    assert density.eq(1).all()
    assert torch.equal(distance[0, 1], ((features[0, 1] - features[0, 0]).square().sum() / 8).sqrt())


@over_peaks
@over_dtypes
def test_a_token_with_nan_counts_for_nothing_and_comes_last(backend: str, dtype: torch.dtype) -> None:
    features = grid(2, 40, 12, dtype)
    clean = check(backend, features[:, 1:], 5)
    features[0, 0, 3] = features[1, 0, 11] = NAN
    assert torch.equal(check(backend, features, 5), clean + 1)
    _, counts, density, distance = tp.density_peaks(features, 40, backend=backend)
    assert counts.tolist() == [40, 40]
    assert density[:, 0].isnan().all()
    assert torch.equal(distance[:, 0], distance.amax(-1))


@over_peaks
@pytest.mark.parametrize("special", [INF, -INF, 1e19, -3e19, 1e30])
def test_what_overflows_is_treated_as_the_reference_does(backend: str, special: float) -> None:
    for filled in (slice(None), slice(0, 1)):
        features = grid(2, 40, 12, torch.float32)
        features[:, ::9, filled] = special
        got = tp.density_peaks(features, 6, backend=backend)
        want = tp.reference.density_peaks(features, 6)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, equal_nan=True)


@over_peaks
def test_samples_of_different_length(backend: str) -> None:
    features, mask = grid(3, 60, 9, torch.float32), torch.arange(60) < torch.tensor([[60], [17], [1]])
    got = tp.density_peaks(features, 7, mask=mask, backend=backend)
    for b, length in enumerate((60, 17, 1)):
        alone = tp.density_peaks(features[b : b + 1, :length], 7, backend=backend)
        assert torch.equal(got[0][b], alone[0][0])
        assert torch.equal(got[2][b, :length], alone[2][0])
        assert torch.equal(got[3][b, :length], alone[3][0])


def with_threads(features: Tensor, k: int, neighbors: int, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """What the CPU kernel gives, which is the same to the bit for several numbers of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(tp.density_peaks(features, k, neighbors=neighbors, mask=mask, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))
    return results[0]


def check_threads(features: Tensor, k: int, neighbors: int, mask: Tensor | None = None) -> None:
    """On a grid the reference is exact but for divisions."""
    got, want = (
        with_threads(features, k, neighbors, mask),
        tp.reference.density_peaks(features, k, neighbors=neighbors, mask=mask),
    )
    assert torch.equal(got[1], want[1])
    for g, w in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(g, w)


@compiled
def test_more_tokens_than_distances_are_stored_for() -> None:
    """Beyond these some of the distances are computed twice instead, to the same bits."""
    stored_for, n = 5760, 5800
    few = torch.randint(0, 5, (1, stored_for, 4)).float()
    far = torch.full((1, n - stored_for, 4), 1e4)
    mask = torch.arange(n).unsqueeze(0) < stored_for
    stored = tp.density_peaks(few, 40, backend="cpu")
    same = tp.density_peaks(torch.cat([few, far], 1), 40, mask=mask, backend="cpu")  # the masked ones do not count
    assert all(
        torch.equal(g, w) for g, w in zip((same[0], same[2][:, :stored_for]), (stored[0], stored[2]), strict=True)
    )
    computed = with_threads(torch.cat([few, far], 1), 40, 5)
    assert torch.equal(computed[2][:, :stored_for], stored[2])
    densest = stored[3].argmax()  # whose distance is the largest of all pairs, which the far ones change
    rest = torch.arange(stored_for) != densest
    assert torch.equal(computed[3][:, :stored_for][:, rest], stored[3][:, rest])


@compiled
@pytest.mark.parametrize(("n", "neighbors"), [(97, 5), (4300, 4000)])
def test_threads_change_no_bit(n: int, neighbors: int) -> None:
    """In whatever order tiles of distances come, also where the heaps of all tokens do not fit into memory at once."""
    check_threads(grid(1, n, 3, torch.float32, 200), 40, neighbors)


@compiled
@settings(deadline=None, max_examples=30, print_blob=True)
@given(data=st.data())
def test_random_shapes_of_several_tiles(data) -> None:
    batch, n, channels = data.draw(st.integers(1, 2)), data.draw(st.integers(90, 420)), data.draw(st.integers(0, 40))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    keep = data.draw(st.sampled_from([0.6, 0.97, None]))
    mask = None if keep is None else torch.rand(batch, n) < keep
    features = grid(batch, n, channels, dtype, data.draw(st.sampled_from([2, 9, 60])))
    check_threads(features, data.draw(st.integers(0, n)), data.draw(st.integers(1, 2 * n)), mask)


@settings(deadline=None, max_examples=60, print_blob=True)
@given(data=st.data())
def test_random_shapes(data) -> None:
    batch, n, k = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 70)), data.draw(st.integers(0, 75))
    channels, neighbors = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 75))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    features = grid(batch, n, channels, dtype, data.draw(st.sampled_from([2, 9])))
    density = data.draw(st.sampled_from([0.0, 0.3, 0.9, None]))
    mask = None if density is None else torch.rand(batch, n) < density
    for backend in PEAKS:
        if dtype in dtypes_of(backend) and (backend not in GPU_BACKENDS or batch * n <= 70):
            check(backend, features, k, neighbors, mask)


PER_CAPABILITY = """
import torch
from testing.cases import DTYPES
from tests.ops.test_density import check, grid
torch.manual_seed(0)
for dtype in DTYPES:
    for channels in (1, 72, 270):
        for n in (1, 48, 59, 97):
            check("cpu", grid(1, n, channels, dtype), 7)
single = torch.randn(1, 30, 270)
import tokenprune_kernels as tp
assert (tp.density_peaks(torch.cat([single, single], 1), 5, neighbors=2)[2] == 1).all()
print("done")
"""


@compiled
@over_capabilities
def test_every_cpu_capability(capability: str) -> None:
    assert run_with_capability(capability, PER_CAPABILITY) == ["done"]
