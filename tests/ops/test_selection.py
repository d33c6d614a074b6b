"""Selecting tokens: ties, NaN, infinities, masks, a budget beyond the tokens; exactly the reference's indices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import (
    BACKENDS,
    DTYPES,
    assert_as_good_as_torch,
    backends_of,
    dtypes_of,
    over_backends,
    over_dtypes,
)

NAN, INF = float("nan"), float("inf")
# Few values, exact in every dtype: ties, signed zeros, infinities, NaN, small neighbours of zero.
VALUES = (0.0, -0.0, 1.0, 2.0, 0.5, -1.0, -2.0, INF, -INF, NAN, 2.0**-20, -(2.0**-20))


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, g, w in zip(("indices", "counts", "num_text"), got, want, strict=False):
        assert g.dtype == w.dtype == torch.int64
        assert torch.equal(g, w), f"{name}:\n{g}\nexpected\n{w}"


def row(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([values], dtype=dtype)


@over_backends
@over_dtypes
class TestTopk:
    @pytest.mark.parametrize(
        ("scores", "k", "largest", "want"),
        [
            ((3, 1, 2), 2, True, [0, 2]),
            ((3, 1, 2), 2, False, [1, 2]),
            ((1, 1, 1, 1), 2, True, [0, 1]),
            ((0.0, -0.0, 0.0), 2, True, [0, 1]),
            ((-0.0, 0.0, 0.0), 2, False, [0, 1]),
            ((NAN, -INF, NAN, 1), 2, True, [1, 3]),
            ((NAN, INF, NAN, 1), 2, False, [1, 3]),
            ((NAN, NAN, NAN), 2, True, [0, 1]),
            ((NAN, NAN, NAN), 2, False, [0, 1]),
            ((INF, 1, INF, -INF), 3, True, [0, 1, 2]),
            ((1, 2), 4, True, [0, 1, -1, -1]),
            ((1, 2), 0, True, []),
            ((), 2, True, [-1, -1]),
            ((5,), 1, True, [0]),
        ],
    )
    def test_order(self, backend, dtype, scores, k, largest, want):
        indices, counts = tp.select_topk(row(*scores, dtype=dtype), k, largest=largest, backend=backend)
        assert indices.tolist() == [want]
        assert counts.tolist() == [sum(i >= 0 for i in want)]

    def test_budgets(self, backend, dtype):
        """Each sample as if it were called alone with the smaller one of its budget and k."""
        budgets = torch.tensor([3, 0, -1, 7, 2**62, -(2**63), 1])
        scores = torch.randint(-3, 4, (7, 11), generator=torch.Generator().manual_seed(0)).to(dtype)
        mask = torch.rand(7, 11, generator=torch.Generator().manual_seed(1)) > 0.3
        for k in (0, 1, 5, 20):
            for largest in (True, False):
                options = {"largest": largest, "mask": mask}
                indices, counts = tp.select_topk(scores, k, budgets=budgets, backend=backend, **options)
                for b, budget in enumerate(budgets.tolist()):
                    alone = {**options, "mask": mask[b : b + 1]}
                    few = min(max(budget, 0), k)
                    want, count = tp.select_topk(scores[b : b + 1], few, backend="reference", **alone)
                    assert indices[b].tolist() == want[0].tolist() + [-1] * (k - few)
                    assert counts[b] == count[0]

    def test_masked_tokens_are_never_selected(self, backend, dtype):
        scores = row(9, 1, INF, 3, NAN, dtype=dtype)
        mask = torch.tensor([[False, True, False, True, True]])
        indices, counts = tp.select_topk(scores, 4, mask=mask, backend=backend)
        assert indices.tolist() == [[1, 3, 4, -1]]
        assert counts.tolist() == [3]

    def test_everything_masked(self, backend, dtype):
        scores = torch.ones(2, 3, dtype=dtype)
        indices, counts = tp.select_topk(scores, 2, mask=torch.zeros(2, 3, dtype=torch.bool), backend=backend)
        assert indices.eq(-1).all()
        assert counts.tolist() == [0, 0]


@pytest.mark.parametrize("n", [511, 4096, 100_000])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", ["uniform", "narrow", "softmax", "tied", "outlier"])
def test_topk_agrees_with_a_sort_of_many(n, largest, dtype, spread):
    """Distributions that a histogram of keys can get wrong: all in one bin, one value far away, many equal."""
    scores = {
        "uniform": lambda: torch.rand(2, n, dtype=torch.float64),
        "narrow": lambda: 1 + torch.rand(2, n, dtype=torch.float64) * 1e-7,
        "softmax": lambda: (torch.randn(2, n, dtype=torch.float64) * 4).softmax(-1),
        "tied": lambda: torch.randint(0, 3, (2, n)).double(),
        "outlier": lambda: torch.cat([torch.tensor([[INF, -1e30]] * 2), torch.randn(2, n - 2)], -1),
    }[spread]().to(dtype)
    for k in (1, n // 5, n - 1):
        want = scores.sort(dim=-1, descending=largest, stable=True).indices[:, :k].sort(-1).values
        indices, counts = tp.select_topk(scores, k, largest=largest)
        assert torch.equal(indices, want)
        assert counts.tolist() == [k, k]


def literal_groups(
    scores: Tensor, groups: Tensor, budgets: Tensor, k: int, mask: Tensor | None, largest: bool
) -> tuple[list[list[int]], list[int]]:
    """The contract's words in plain Python: of every group the budget's best, then the first k of all of them."""
    indices, counts = [], []
    for b in range(scores.shape[0]):
        kept: list[int] = []
        for g in range(budgets.shape[1]):
            tokens = [
                i for i in range(scores.shape[1]) if groups[b, i] == g and (mask is None or bool(mask[b, i]))
            ]  # fmt: skip

            def place(i: int, b: int = b) -> tuple[bool, float, int]:
                value = float(scores[b, i])
                return value != value, 0.0 if value != value else -value if largest else value, i

            kept += sorted(tokens, key=place)[: max(int(budgets[b, g]), 0)]
        kept = sorted(kept)[:k]
        counts.append(len(kept))
        indices.append(kept + [-1] * (k - len(kept)))
    return indices, counts


GROUPED_BACKENDS = backends_of("select_grouped_topk")


@pytest.mark.parametrize("backend", GROUPED_BACKENDS)
class TestGroupedTopk:
    @over_dtypes
    @pytest.mark.parametrize(
        ("scores", "groups", "budgets", "k", "largest", "want"),
        [
            ((9, 8, 7, 1, 3, 2), (0, 0, 0, 1, 1, 1), (1, 2), 4, True, [0, 4, 5, -1]),
            ((9, 8, 7, 1, 3, 2), (0, 1, 0, 1, 0, 1), (1, 1), 2, False, [3, 4]),
            ((5, 5, 5, 5), (2, 0, 2, 0), (1, 9, 1), 3, True, [0, 1, -1]),
            ((5, 6, 7, 8), (-1, 0, 1, 2), (4, 4), 4, True, [1, 2, -1, -1]),
            ((5, 6, 7, 8), (2**62, -(2**63), 0, 1), (1, 1), 4, True, [2, 3, -1, -1]),
            ((1, 2, 3, 4), (0, 0, 0, 0), (3,), 2, True, [1, 2]),
            ((1, 2, 3, 4), (0, 0, 1, 1), (-5, 2**62), 4, True, [2, 3, -1, -1]),
            ((NAN, -INF, NAN, 1), (0, 0, 1, 1), (1, 1), 2, True, [1, 3]),
            ((NAN, INF, NAN, 1), (0, 0, 1, 1), (2, 1), 3, False, [0, 1, 3]),
            ((0.0, -0.0, 0.0), (0, 0, 0), (2,), 2, True, [0, 1]),
            ((1, 2), (0, 0), (), 2, True, [-1, -1]),
            ((), (), (1, 2), 2, True, [-1, -1]),
            ((1, 2), (0, 0), (1,), 0, True, []),
        ],
    )
    def test_groups(self, backend, dtype, scores, groups, budgets, k, largest, want):
        group_of, budget = torch.tensor([groups], dtype=torch.int64), torch.tensor([budgets], dtype=torch.int64)
        indices, counts = tp.select_grouped_topk(
            row(*scores, dtype=dtype), group_of, budget, k, largest=largest, backend=backend
        )
        assert indices.tolist() == [want]
        assert counts.tolist() == [sum(i >= 0 for i in want)]

    def test_each_sample_has_its_own_groups_and_budgets(self, backend):
        scores = torch.arange(6.0).repeat(2, 1)
        groups = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]])
        indices, counts = tp.select_grouped_topk(scores, groups, torch.tensor([[1, 1], [2, 0]]), 3, backend=backend)
        assert indices.tolist() == [[2, 5, -1], [3, 5, -1]]
        assert counts.tolist() == [2, 2]

    def test_masked_tokens_do_not_use_up_the_budget(self, backend):
        mask = torch.tensor([[False, True, True, True]])
        got = tp.select_grouped_topk(row(9, 1, 2, 3), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[2]]), 4,
                                     mask=mask, backend=backend)  # fmt: skip
        assert got[0].tolist() == [[2, 3, -1, -1]]

    def test_one_group_is_select_topk(self, backend):
        scores, mask = torch.randint(0, 9, (3, 200)).float(), torch.rand(3, 200) < 0.8
        groups, budgets = torch.zeros(3, 200, dtype=torch.int64), torch.tensor([[0], [17], [400]])
        for largest in (True, False):
            got = tp.select_grouped_topk(scores, groups, budgets, 40, mask=mask, largest=largest, backend=backend)
            want = tp.select_topk(scores, 200, mask=mask, largest=largest, budgets=budgets[:, 0], backend="reference")
            assert torch.equal(got[0], want[0][:, :40])
            assert torch.equal(got[1], want[1].clamp(max=40))


@settings(deadline=None, max_examples=200, print_blob=True)
@given(data=st.data())
def test_random_groups_with_many_ties(data):
    batch, n, k = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 60)), data.draw(st.integers(0, 70))
    dtype, count = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    pool = torch.tensor(data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=8)))
    scores = pool[torch.randint(0, len(pool), (batch, n), generator=generator)].to(dtype)
    groups = torch.randint(-1, count + 1, (batch, n), generator=generator)
    budgets = torch.randint(-2, 12, (batch, count), generator=generator)
    density = data.draw(st.sampled_from([0.0, 0.5, 0.9, None]))
    mask = None if density is None else torch.rand(batch, n, generator=generator) < density
    largest = data.draw(st.booleans())
    want = literal_groups(scores, groups, budgets, k, mask, largest)
    for backend in GROUPED_BACKENDS:
        if dtype in dtypes_of(backend):
            indices, counts = tp.select_grouped_topk(
                scores, groups, budgets, k, mask=mask, largest=largest, backend=backend
            )
            assert (indices.tolist(), counts.tolist()) == want


@over_backends
class TestTwoTailed:
    @pytest.mark.parametrize(
        ("scores", "low", "k", "want"),
        [
            ((5, 1, 4, 2, 3), 1, 3, [0, 1, 2]),
            ((5, 1, 4, 2, 3), 3, 3, [1, 3, 4]),
            ((5, 1, 4, 2, 3), -7, 2, [0, 2]),
            ((5, 1, 4, 2, 3), 99, 2, [1, 3]),
            ((1, 1, 1, 1), 1, 3, [0, 1, 2]),
            ((NAN, 1, 2, NAN), 1, 2, [1, 2]),
            ((NAN, 1, NAN, NAN), 1, 3, [0, 1, 2]),
            ((1, 2), 1, 4, [0, 1, -1, -1]),
            ((1, 2), 1, 0, []),
            ((), 1, 2, [-1, -1]),
        ],
    )
    def test_tails(self, backend, scores, low, k, want):
        indices, counts = tp.select_two_tailed(row(*scores), torch.tensor([low]), k, backend=backend)
        assert indices.tolist() == [want]
        assert counts.tolist() == [sum(i >= 0 for i in want)]

    def test_each_sample_has_its_own_tail(self, backend):
        scores = torch.arange(6.0).repeat(4, 1)
        indices, _ = tp.select_two_tailed(scores, torch.tensor([0, 1, 2, 3]), 3, backend=backend)
        assert indices.tolist() == [[3, 4, 5], [0, 4, 5], [0, 1, 5], [0, 1, 2]]

    def test_tail_counts_may_be_strided(self, backend):
        low = torch.tensor([[1, 50], [2, 50]])[:, 0]
        scores = torch.arange(6.0).repeat(2, 1)
        indices, _ = tp.select_two_tailed(scores, low, 3, backend=backend)
        assert indices.tolist() == [[0, 4, 5], [0, 1, 5]]

    def test_low_part_excludes_masked_and_high(self, backend):
        mask = torch.tensor([[True, False, True, True, True]])
        indices, _ = tp.select_two_tailed(row(5, 0, 4, 2, 3), torch.tensor([2]), 4, mask=mask, backend=backend)
        assert indices.tolist() == [[0, 2, 3, 4]]


@over_backends
class TestMaskToIndices:
    def test_positions(self, backend):
        mask = torch.tensor([[True, False, True, True], [False] * 4])
        indices, counts = tp.mask_to_indices(mask, 5, backend=backend)
        assert indices.tolist() == [[0, 2, 3, -1, -1], [-1] * 5]
        assert counts.tolist() == [3, 0]

    def test_cut_at_capacity(self, backend):
        indices, counts = tp.mask_to_indices(torch.ones(1, 7, dtype=torch.bool), 2, backend=backend)
        assert indices.tolist() == [[0, 1]]
        assert counts.tolist() == [2]

    @pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
    def test_empty(self, backend, shape):
        indices, counts = tp.mask_to_indices(torch.ones(shape, dtype=torch.bool), 2, backend=backend)
        assert indices.tolist() == [[-1, -1]] * shape[0]
        assert counts.tolist() == [0] * shape[0]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="without the compiled library there is only the reference")
@settings(deadline=None, max_examples=300, print_blob=True)
@given(data=st.data())
def test_random_scores_with_many_ties(data):
    """Every selecting op, exactly as the reference does it, on values with ties, NaN, infinities and signed zeros."""
    batch, n, k = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 60)), data.draw(st.integers(0, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    pool = torch.tensor(data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=8)))

    def scores() -> Tensor:
        return pool[torch.randint(0, len(pool), (batch, n), generator=generator)].to(dtype)

    density = data.draw(st.sampled_from([0.0, 0.2, 0.9, None]))
    mask = None if density is None else torch.rand(batch, n, generator=generator) < density
    first, second = scores(), scores()
    num_low = torch.randint(-2, k + 3, (batch,), generator=generator)
    calls = [
        ("select_topk", (first, k), {"mask": mask}),
        ("select_topk", (first, k), {"mask": mask, "largest": False}),
        ("select_two_tailed", (first, num_low, k), {"mask": mask}),
        (
            "select_mixture",
            (first, second, k),
            {"mask": mask, "floor": data.draw(st.sampled_from([0, 0.1, 0.25, 0.5]))},
        ),
        ("mask_to_indices", (torch.rand(batch, n, generator=generator) < 0.5, k), {}),
    ]
    for name, args, kwargs in calls:
        op = getattr(tp, name)
        equal(op(*args, **kwargs, backend="cpu"), op(*args, **kwargs, backend="reference"))


@over_backends
class TestScoreEntropy:
    @over_dtypes
    @pytest.mark.parametrize("normalized", [True, False])
    def test_accuracy(self, backend, dtype, normalized):
        for n in (2, 72, 576, 16384):
            scores = (torch.randn(3, n) * 3).softmax(-1).to(dtype)
            mask = torch.rand(3, n) < 0.8
            for m in (None, mask):
                got = tp.score_entropy(scores, mask=m, normalized=normalized, backend=backend)
                exact = tp.reference.score_entropy(scores.double(), mask=m, normalized=normalized)
                plain = tp.reference.score_entropy(scores, mask=m, normalized=normalized)
                assert_as_good_as_torch(got, exact, plain, scale=exact.abs().max().item())

    def test_uniform_is_one(self, backend):
        assert tp.score_entropy(torch.full((1, 8), 0.5), backend=backend).item() == pytest.approx(1, abs=1e-6)

    def test_single_peak_is_zero(self, backend):
        assert tp.score_entropy(row(0, 3, 0), backend=backend).item() == 0

    def test_all_zero_counts_as_uniform(self, backend):
        scores = row(0, 0, -1, NAN)
        assert tp.score_entropy(scores, backend=backend).item() == pytest.approx(1, abs=1e-6)
        got = tp.score_entropy(scores, normalized=False, backend=backend)
        torch.testing.assert_close(got, torch.tensor([4.0]).log())

    def test_nan_and_negative_count_as_zero(self, backend):
        got = tp.score_entropy(row(NAN, 1, -5, 1, -INF), normalized=False, backend=backend)
        torch.testing.assert_close(got, torch.tensor([2.0]).log())

    @pytest.mark.parametrize("n", [0, 1])
    def test_at_most_one_token_gives_zero(self, backend, n):
        assert tp.score_entropy(torch.ones(2, n), backend=backend).tolist() == [0, 0]
        mask = torch.zeros(2, 5, dtype=torch.bool)
        mask[:, :n] = True
        for normalized in (True, False):
            assert tp.score_entropy(torch.ones(2, 5), mask=mask, normalized=normalized, backend=backend).tolist() == [
                0,
                0,
            ]

    def test_masked_infinity_does_not_count(self, backend):
        mask = torch.tensor([[True, True, False, False]])
        got = tp.score_entropy(row(1, 1, INF, NAN), mask=mask, backend=backend)
        assert got.item() == pytest.approx(1, abs=1e-6)

    def test_infinite_score_has_no_entropy(self, backend):
        assert tp.score_entropy(row(1, INF), backend=backend).isnan().all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="without the compiled library there is only the reference")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_threads(threads):
    scores = torch.randint(0, 50, (37, 3000)).float()
    mask = torch.rand(37, 3000) < 0.7
    low = torch.randint(0, 300, (37,))
    want = [
        tp.reference.select_topk(scores, 300, mask=mask),
        tp.reference.select_two_tailed(scores, low, 300, mask=mask),
        tp.reference.select_mixture(scores, scores.flip(-1), 300, mask=mask),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        equal(tp.select_topk(scores, 300, mask=mask), want[0])
        equal(tp.select_two_tailed(scores, low, 300, mask=mask), want[1])
        equal(tp.select_mixture(scores, scores.flip(-1), 300, mask=mask), want[2])
    finally:
        torch.set_num_threads(before)
