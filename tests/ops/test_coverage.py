"""coverage_sample: the contract in plain Python, each step replayed, falling gains, ties, weights, masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import backends_of, compiled, dtypes_of, over_capabilities, over_dtypes, run_with_capability

over_backends = pytest.mark.parametrize("backend", backends_of("coverage_sample"))


def value(x: float) -> float:
    return x if x > 0 else 0.0  # negative and NaN


def greedy(
    similarity: Tensor, k: int, weights: Tensor, quality: Tensor, row_mask: Tensor, mask: Tensor
) -> tuple[list[int], list[float]]:
    """The contract's sentences for one sample, number by number."""
    rows = [r for r in range(similarity.shape[0]) if bool(row_mask[r])]
    table = [[value(x) for x in row] for row in similarity.double().tolist()]
    covered = dict.fromkeys(rows, 0.0)
    picks: list[int] = []
    gains: list[float] = []
    while len(picks) < k:
        best, most = -1, -1.0
        for n in range(similarity.shape[1]):
            if n in picks or not bool(mask[n]):
                continue
            terms = (value(float(weights[r])) * max(table[r][n] - covered[r], 0.0) for r in rows)
            gain = value(float(quality[n])) * math.fsum(terms)
            if gain > most:
                best, most = n, gain
        if best < 0:
            break
        picks.append(best)
        gains.append(most)
        covered = {r: max(c, table[r][best]) for r, c in covered.items()}
    return picks, gains


@over_backends
@settings(deadline=None, max_examples=60, print_blob=True)
@given(
    seed=st.integers(0, 2**32), rows=st.integers(0, 90), n=st.integers(1, 40), high=st.sampled_from([1, 2, 9, 200]),
    spoiled=st.booleans(),
)  # fmt: skip
def test_the_contract_number_by_number(backend: str, seed: int, rows: int, n: int, high: int, spoiled: bool) -> None:
    """Small integers: every sum is exact, ties are frequent, and picks and gains are equal to the last bit."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, up: int, *shape: int) -> Tensor:
        return torch.randint(low, up + 1, shape, generator=generator).float()

    similarity = integers(-1, high, 1, rows, n)
    weights, quality = integers(-1, 3, 1, rows), integers(-1, 3, 1, n)
    row_mask, mask = integers(0, 3, 1, rows) > 0, integers(0, 3, 1, n) > 0
    if spoiled:
        for t in (similarity, weights, quality):
            t[torch.rand(t.shape, generator=generator) < 0.1] = torch.nan
    k = int(torch.randint(n + 3, (), generator=generator))
    options = {"row_weights": weights, "quality": quality, "row_mask": row_mask, "mask": mask}
    indices, gains, counts = tp.coverage_sample(similarity, k, **options, backend=backend)
    picks, exact = greedy(similarity[0], k, weights[0], quality[0], row_mask[0], mask[0])
    assert counts.item() == len(picks)
    assert indices[0].tolist() == picks + [-1] * (k - len(picks))
    assert gains[0].tolist() == exact + [0.0] * (k - len(picks))


def replay(similarity: Tensor, order: list[int], weights: Tensor, quality: Tensor) -> Tensor:
    """The gains [len(order), N] in float64 before each pick."""
    s, w, q = (t.double() for t in (similarity, weights, quality))
    s = torch.where(s > 0, s, 0.0)
    covered, gains = torch.zeros(len(s), dtype=torch.float64), []
    for j in order:
        gains.append(q * (w @ (s - covered[:, None]).clamp_min(0)))
        covered = torch.maximum(covered, s[:, j])
    return torch.stack(gains)


@over_backends
@over_dtypes
@pytest.mark.parametrize("kind", ["cosines", "softmax"])
def test_replay(backend: str, dtype: torch.dtype, kind: str) -> None:
    """Each pick is the best given the earlier ones, up to rounding, and its gain is the exact one; gains only fall."""
    features = torch.randn(1, 200, 24)
    similarity = torch.nn.functional.normalize(features, dim=-1)
    similarity = similarity @ similarity.mT
    if kind == "softmax":  # MMTok's rows, where a few tokens cover almost everything
        similarity = (similarity / 0.02).softmax(-1)
    similarity, weights, quality = similarity.to(dtype), torch.rand(1, 200).to(dtype), torch.rand(1, 200).to(dtype)
    indices, gains, counts = tp.coverage_sample(similarity, 90, row_weights=weights, quality=quality, backend=backend)
    order = indices[0].tolist()
    assert counts.tolist() == [90]
    assert len(set(order)) == 90
    exact = replay(similarity[0], order, weights[0], quality[0])
    # A sum of 200 terms that are not negative: every addition rounds what is there so far.
    slack = 200 * torch.finfo(gains.dtype).eps * exact.amax()
    for t, j in enumerate(order):
        left = exact[t].clone()
        left[order[:t]] = 0
        assert exact[t, j] >= left.max() - slack, f"step {t}"
        assert abs(gains[0, t].item() - exact[t, j]) <= slack, f"step {t}"
    assert (gains[0].diff() <= 0).all()


@over_backends
@over_dtypes
def test_a_lazy_pick_is_the_first_of_the_best(backend: str, dtype: torch.dtype) -> None:
    """Gains that rounding could tear apart: copies of columns, in any order, are picked lowest index first."""
    base = torch.rand(1, 150, 30)
    if backend == "reference":  # whose sums round each column by where it stands: exact sums for that
        base = (base * 8).round() / 8
    base = base.to(dtype)
    order = torch.randperm(90)
    copies = base.repeat(1, 1, 3)[:, :, order]
    indices, _, counts = tp.coverage_sample(copies, 90, backend=backend)
    assert counts.item() == 90
    step = torch.empty(90, dtype=torch.int64).scatter(0, indices[0], torch.arange(90))
    for column in range(30):
        positions = (order % 30 == column).nonzero().squeeze(1)  # ascending
        assert (step[positions].diff() > 0).all(), f"copies of {column}"


@over_backends
def test_nothing_left_to_cover(backend: str) -> None:
    """Gains of 0 go by the lowest index, also where a stale gain was larger."""
    similarity = torch.tensor([[[0.5, 1.0, 0.5, 0.25, 1.0], [0.0, 1.0, 0.75, 0.0, 0.5]]])
    indices, gains, counts = tp.coverage_sample(similarity, 7, backend=backend)
    assert indices.tolist() == [[1, 0, 2, 3, 4, -1, -1]]
    assert gains.tolist() == [[2.0, 0, 0, 0, 0, 0, 0]]
    assert counts.tolist() == [5]


@over_backends
def test_weights_quality_and_masks(backend: str) -> None:
    similarity = torch.tensor([[[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.5, torch.nan], [0.0, 0.0, 0.0, 1.0]]])

    def picks(**options: Tensor) -> list[int]:
        return tp.coverage_sample(similarity, 4, **options, backend=backend)[0][0].tolist()

    assert picks() == [0, 1, 3, 2]
    assert picks(row_weights=torch.tensor([[1.0, 2.0, 4.0]])) == [3, 1, 0, 2]
    assert picks(row_weights=torch.tensor([[torch.nan, 2.0, -4.0]])) == [1, 0, 2, 3]
    assert picks(row_mask=torch.tensor([[False, True, False]])) == [1, 0, 2, 3]
    assert picks(quality=torch.tensor([[1.0, 1.0, 4.0, 1.0]])) == [2, 3, 0, 1]
    assert picks(quality=torch.tensor([[torch.nan, 1.0, -1.0, 0.0]])) == [1, 0, 2, 3]
    assert picks(mask=torch.tensor([[False, True, True, True]])) == [1, 3, 2, -1]
    assert picks(row_mask=torch.zeros(1, 3, dtype=torch.bool)) == [0, 1, 2, 3]


@over_backends
def test_rows_that_do_not_count_change_nothing(backend: str) -> None:
    dtype = dtypes_of(backend)[-1]
    similarity, row_mask = torch.rand(1, 140, 60).to(dtype), torch.rand(1, 140) < 0.5
    kept = row_mask[0].nonzero().squeeze(1)
    got = tp.coverage_sample(similarity, 20, row_mask=row_mask, backend=backend)
    alone = tp.coverage_sample(similarity[:, kept], 20, backend=backend)
    weighted = tp.coverage_sample(similarity, 20, row_weights=row_mask.to(dtype), backend=backend)
    for other in (alone, weighted):
        assert torch.equal(got[0], other[0])
        torch.testing.assert_close(got[1], other[1], rtol=1e-5, atol=0)


@over_backends
@over_dtypes
@settings(deadline=None, max_examples=15, print_blob=True)
@given(seed=st.integers(0, 2**32), layout=st.sampled_from(["transposed", "sliced", "repeated row"]))
def test_any_strides(backend: str, dtype: torch.dtype, seed: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 9, (2, 70, 90), generator=generator).to(dtype)
    view = {"transposed": table.mT, "sliced": table[:, ::3, 5:71], "repeated row": table[:, :1].expand(2, 40, 90)}
    similarity = view[layout]
    got = tp.coverage_sample(similarity, 12, backend=backend)
    want = tp.coverage_sample(similarity.contiguous(), 12, backend=backend)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@compiled
def test_threads_and_batch_do_not_matter() -> None:
    similarity, quality = torch.rand(3, 500, 700), torch.rand(3, 700)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(tp.coverage_sample(similarity, 150, quality=quality, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])
    alone = tp.coverage_sample(similarity[1:2], 150, quality=quality[1:2], backend="cpu")
    assert torch.equal(alone[0], results[0][0][1:2])
    assert torch.equal(alone[1], results[0][1][1:2])


@compiled
@over_capabilities
def test_every_capability(capability: str) -> None:
    script = """
import torch, tokenprune_kernels as tp
torch.manual_seed(0)
similarity, weights = torch.randint(0, 200, (1, 230, 170)).float(), torch.randint(0, 5, (1, 230)).float()
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    got = tp.coverage_sample(similarity.to(dtype), 60, row_weights=weights, backend="cpu")
    want = tp.reference.coverage_sample(similarity, 60, row_weights=weights)
    print(*(torch.equal(g.double(), w.double()) for g, w in zip(got, want)))
"""
    assert run_with_capability(capability, script) == ["True True True"] * 3
