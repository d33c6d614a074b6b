"""dpp_sample: determinants, the factor in plain Python, each step replayed, ranks, ties and edge cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import backends_of, compiled, dtypes_of, over_capabilities, over_dtypes, run_with_capability

over_backends = pytest.mark.parametrize("backend", backends_of("dpp_sample"))


def kernel_matrix(features: Tensor, quality: Tensor | None = None) -> np.ndarray:
    """q_i q_j cos(f_i, f_j) of one sample in float64."""
    f = features.double().numpy()
    norm = np.sqrt((f * f).sum(1))
    unit = f / np.where(norm < 1e-12, 1e-12, norm)[:, None]
    q = np.ones(len(f)) if quality is None else quality.double().numpy()
    return q[:, None] * (unit @ unit.T) * q[None, :]


def rounding(dtype: torch.dtype, channels: int) -> float:
    """What a cosine computed in the arithmetic of `dtype` errs by at most: about 2 (C + 8) roundings."""
    return (channels + 8) * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def greedy(features: Tensor, k: int, quality: Tensor, mask: Tensor, epsilon: float) -> tuple[list[int], list[float]]:
    """The contract's sentences, number by number."""
    kernel, n = kernel_matrix(features, quality), len(features)
    d2 = [kernel[i, i] for i in range(n)]
    columns: list[list[float]] = []  # one for each pick that counted
    picks: list[int] = []
    gains: list[float] = []
    while len(picks) < k:
        best = -1
        for i in range(n):
            if bool(mask[i]) and i not in picks and (best < 0 or d2[i] > d2[best]):
                best = i
        if best < 0:
            break
        picks.append(best)
        gains.append(d2[best])
        if d2[best] <= epsilon * float(quality[best]) ** 2:
            continue
        column = [
            (kernel[best, i] - math.fsum(c[best] * c[i] for c in columns)) / math.sqrt(d2[best]) for i in range(n)
        ]
        columns.append(column)
        d2 = [d2[i] - column[i] ** 2 for i in range(n)]
    return picks, gains


@over_backends
@settings(deadline=None, max_examples=40, print_blob=True)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 24), channels=st.sampled_from([1, 5, 16, 33, 72]))
def test_the_contract_number_by_number(backend: str, seed: int, n: int, channels: int) -> None:
    """Qualities that are powers of two apart, so that no rounding changes a pick while the kernel has rank left."""
    generator = torch.Generator().manual_seed(seed)
    dtype = dtypes_of(backend)[-1]
    features = torch.randn(1, n, channels, generator=generator).to(dtype)
    quality = (2.0 ** -torch.randperm(n, generator=generator)[None]).to(dtype)
    mask = torch.rand(1, n, generator=generator) < 0.8
    k = int(torch.randint(n + 3, (), generator=generator))
    indices, gains, counts = tp.dpp_sample(features, k, quality=quality, mask=mask, backend=backend)
    picks, exact = greedy(features[0], k, quality[0], mask[0], 1e-6)
    within = [t for t, gain in enumerate(exact) if gain > 1e-3 * float(quality[0, picks[t]]) ** 2]
    solid = next((t for t in range(len(picks)) if t not in within), len(picks))
    assert counts.item() == len(picks)
    assert indices[0, counts.item() :].tolist() == [-1] * (k - counts.item())
    assert indices[0, :solid].tolist() == picks[:solid]
    assert gains[0, :solid].tolist() == pytest.approx(exact[:solid], rel=1e3 * rounding(dtype, channels), abs=0)


@over_backends
@over_dtypes
def test_gains_multiply_to_the_determinant(backend: str, dtype: torch.dtype) -> None:
    features, quality = torch.randn(2, 30, 48).to(dtype), torch.rand(2, 30).to(dtype) + 0.25
    indices, gains, counts = tp.dpp_sample(features, 12, quality=quality, backend=backend)
    assert counts.tolist() == [12, 12]
    for b in range(2):
        kernel = kernel_matrix(features[b], quality[b])
        for t in range(1, 13):
            chosen = indices[b, :t].numpy()
            sign, log = np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])
            assert sign == 1
            # Every gain is at least 0.01 here: relative errors are the cosines' times 100, added up.
            assert gains[b, :t].double().log().sum().item() == pytest.approx(log, abs=100 * t * rounding(dtype, 48))


def schur_complements(kernel: np.ndarray, chosen: list[int]) -> np.ndarray:
    """By what each token multiplies the determinant over the chosen ones: L_ii - L_iS L_SS^-1 L_Si."""
    if not chosen:
        return np.diag(kernel).copy()
    block = kernel[:, chosen]
    return np.diag(kernel) - (block * np.linalg.solve(kernel[np.ix_(chosen, chosen)], block.T).T).sum(1)


@over_backends
@over_dtypes
@pytest.mark.parametrize("with_quality", [False, True])
def test_replay(backend: str, dtype: torch.dtype, with_quality: bool) -> None:
    """Each pick is the best given the earlier ones, up to rounding, and its gain is the exact one."""
    n, k, channels = 150, 60, 96
    features = (torch.randn(1, n, channels) + 0.7 * torch.randn(channels)).to(dtype)
    quality = torch.rand(1, n).to(dtype) if with_quality else None
    indices, gains, counts = tp.dpp_sample(features, k, quality=quality, backend=backend)
    order = indices[0].tolist()
    assert counts.tolist() == [k]
    assert len(set(order)) == k
    kernel = kernel_matrix(features[0], None if quality is None else quality[0])
    for t in range(k):
        exact = schur_complements(kernel, order[:t])
        slack = 20 * rounding(dtype, channels) * np.diag(kernel).max()
        left = np.delete(exact, order[:t])
        assert exact[order[t]] >= left.max() - slack, f"step {t}"
        assert abs(gains[0, t].item() - exact[order[t]]) <= slack, f"step {t}"


@over_backends
@pytest.mark.parametrize("rank", [1, 7, 16, 30])
def test_more_picks_than_the_rank(backend: str, rank: int) -> None:
    """The published loop divides by rounding errors there and repeats picks; here all are distinct and finite."""
    dtype = dtypes_of(backend)[-1]
    basis = torch.randn(1, rank, 64, dtype=torch.float32)
    features = (torch.randn(1, 144, rank) @ basis).to(dtype)
    quality = torch.rand(1, 144).to(dtype) + 0.5
    indices, gains, counts = tp.dpp_sample(features, 100, quality=quality, backend=backend)
    assert counts.tolist() == [100]
    assert len(set(indices[0].tolist())) == 100
    assert gains.isfinite().all()
    own = quality[0][indices[0]].square()
    if dtype != torch.float16:  # whose roundings give the features full rank
        assert (gains[0, rank:] <= 1e-4 * own[rank:]).all()
    assert (gains[0, : min(rank, 7)] > 1e-4 * own[: min(rank, 7)]).all()


@over_backends
def test_beyond_the_rank_quality_decides_and_nothing_changes(backend: str) -> None:
    """Three directions, exactly; then every gain is 0, and the lowest index goes first."""
    directions = torch.tensor([0, 1, 0, 2, 1, 2, 0, 1])
    features = torch.nn.functional.one_hot(directions, 8).float()[None]
    quality = torch.tensor([[1.0, 2.0, 3.0, 0.5, 1.0, 1.0, 2.0, 1.0]])
    indices, gains, counts = tp.dpp_sample(features, 8, quality=quality, backend=backend)
    assert indices.tolist() == [[2, 1, 5, 0, 3, 4, 6, 7]]
    assert gains.tolist() == [[9.0, 4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    assert counts.tolist() == [8]
    # With a large epsilon every pick counts as beyond the rank: the largest quality first, whatever the features.
    indices, gains, _ = tp.dpp_sample(features, 8, quality=quality, epsilon=2.0, backend=backend)
    assert indices.tolist() == [[2, 1, 6, 0, 4, 5, 7, 3]]
    assert gains.tolist() == [[9.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.25]]


@over_backends
def test_qualities_of_every_kind(backend: str) -> None:
    """Signs do not matter, zero is last of the numbers, a quality that is not finite comes after all of them."""
    quality = torch.tensor([[0.0, torch.nan, -3.0, 1.0, torch.inf, 2.0, -0.0, -torch.inf]])
    indices, gains, counts = tp.dpp_sample(torch.eye(8)[None], 8, quality=quality, backend=backend)
    assert indices.tolist() == [[2, 5, 3, 0, 6, 1, 4, 7]]
    assert gains[0, :5].tolist() == [9.0, 4.0, 1.0, 0.0, 0.0]
    assert gains[0, 5:].isnan().all()
    assert counts.tolist() == [8]


@over_backends
@over_dtypes
def test_features_that_are_not_finite_come_last(backend: str, dtype: torch.dtype) -> None:
    features = torch.eye(6, 40).to(dtype)[None]
    features[0, 1, 39], features[0, 3, 20], features[0, 4] = torch.nan, torch.inf, 0
    indices, gains, _ = tp.dpp_sample(features, 6, backend=backend)
    assert indices.tolist() == [[0, 2, 5, 4, 1, 3]]
    assert gains[0, :4].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert gains[0, 4:].isnan().all()


@over_backends
def test_a_scale_of_the_quality_changes_no_pick(backend: str) -> None:
    features, quality = torch.randn(2, 80, 24), torch.rand(2, 80)
    indices, gains, _ = tp.dpp_sample(features, 20, quality=quality, backend=backend)
    for factor in (0.125, 32.0, 2.0**20):
        scaled = tp.dpp_sample(features, 20, quality=quality * factor, backend=backend)
        assert scaled[0].tolist() == indices.tolist()
        torch.testing.assert_close(scaled[1], gains * factor**2, rtol=1e-6, atol=0)


@over_backends
def test_a_masked_token_is_as_if_it_were_not_there(backend: str) -> None:
    features, quality, mask = torch.randn(1, 90, 32), torch.rand(1, 90), torch.rand(1, 90) < 0.5
    kept = mask[0].nonzero().squeeze(1)
    got = tp.dpp_sample(features, 15, quality=quality, mask=mask, backend=backend)
    alone = tp.dpp_sample(features[:, kept], 15, quality=quality[:, kept], backend=backend)
    assert got[0].tolist() == kept[alone[0]].tolist()
    torch.testing.assert_close(got[1], alone[1], rtol=1e-5, atol=1e-6)


@over_dtypes
@over_backends
@pytest.mark.parametrize("channels", [1, 72, 300])
def test_equal_tokens_tie(backend: str, dtype: torch.dtype, channels: int) -> None:
    """Bitwise equal gains whatever computed them: of copies, the one with the lowest index goes first."""
    base = torch.randn(1, 45, channels).to(dtype)
    indices, _, counts = tp.dpp_sample(
        base.repeat(1, 3, 1), 135, quality=torch.rand(1, 45).repeat(1, 3), backend=backend
    )
    assert counts.item() == 135
    step = torch.empty(135, dtype=torch.int64).scatter(0, indices[0], torch.arange(135)).view(3, 45)
    assert (step[0] < step[1]).all()
    if backend != "reference":  # whose matrix product rounds the copies' cosines each in its own way
        assert (step[1] < step[2]).all()


@compiled
def test_threads_and_batch_do_not_matter() -> None:
    features, quality = torch.randn(3, 700, 136), torch.rand(3, 700)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(tp.dpp_sample(features, 150, quality=quality, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])
    alone = tp.dpp_sample(features[1:2], 150, quality=quality[1:2], backend="cpu")
    assert torch.equal(alone[0], results[0][0][1:2])
    assert torch.equal(alone[1], results[0][1][1:2])


@compiled
@over_capabilities
def test_every_capability(capability: str) -> None:
    script = """
import torch, tokenprune_kernels as tp
torch.manual_seed(0)
features, quality = torch.randn(1, 300, 200), 2.0 ** -(torch.randperm(300)[None] / 8)
indices, gains, _ = tp.dpp_sample(features, 60, quality=quality, backend="cpu")
expected = tp.reference.dpp_sample(features.double(), 60, quality=quality)
print(torch.equal(indices, expected[0]), ((gains - expected[1]).abs() < 1e-5).all().item())
"""
    assert run_with_capability(capability, script) == ["True True"]
