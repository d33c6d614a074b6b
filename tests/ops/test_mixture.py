"""select_mixture: AdaFV's rule, its corners, and a budget beyond the tokens; exactly the reference's indices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenprune_kernels as tp
from testing.cases import dtypes_of, over_backends
from tests.ops.test_selection import INF, NAN, equal, row


@over_backends
class TestMixture:
    def test_disjoint_lists_share_evenly(self, backend):
        """Two lists with all mass on their own halves: the product is largest at the middle."""
        text, visual = row(1, 1, 1, 1, 0, 0, 0, 0), row(0, 0, 0, 0, 1, 1, 1, 1)
        indices, counts, num_text = tp.select_mixture(text, visual, 4, floor=0.0, backend=backend)
        assert indices.tolist() == [[0, 1, 4, 5]]
        assert (counts.item(), num_text.item()) == (4, 2)

    def test_concentrated_list_gets_few(self, backend):
        text, visual = row(8, 0, 0, 0, 0, 0, 0, 0), row(0, 1, 1, 1, 1, 1, 1, 1)
        indices, _, num_text = tp.select_mixture(text, visual, 6, floor=0.0, backend=backend)
        assert num_text.item() == 1
        assert indices.tolist() == [[0, 1, 2, 3, 4, 5]]

    def test_floor_reserves(self, backend):
        text, visual = row(8, 0, 0, 0, 0, 0, 0, 0), row(0, 1, 1, 1, 1, 1, 1, 1)
        _, _, num_text = tp.select_mixture(text, visual, 6, floor=0.5, backend=backend)
        assert num_text.item() == 3

    def test_smallest_split_among_equals(self, backend):
        zeros = row(*[0.0] * 8)
        indices, _, num_text = tp.select_mixture(zeros, zeros, 4, floor=0.25, backend=backend)
        assert num_text.item() == 1
        assert indices.tolist() == [[0, 1, 2, 3]]

    def test_duplicates_are_kept_once_and_slots_are_filled(self, backend):
        same = row(4, 3, 2, 1, 0.5, 0.25)
        indices, counts, _ = tp.select_mixture(same, same, 4, backend=backend)
        assert indices.tolist() == [[0, 1, 2, 3]]
        assert counts.item() == 4

    def test_infinite_times_nothing_counts_as_nothing(self, backend):
        text, visual = row(INF, 1, 1, 1), row(0, 0, 0, 0)
        _, _, num_text = tp.select_mixture(text, visual, 2, floor=0.0, backend=backend)
        assert num_text.item() == 0

    def test_dtypes_may_differ(self, backend):
        text, visual = torch.randint(0, 9, (2, 3, 40)).unbind()
        want = tp.reference.select_mixture(text.double(), visual.double(), 10)
        widest = dtypes_of(backend)[-1]
        equal(tp.select_mixture(text.half(), visual.to(widest), 10, backend=backend), want)
        equal(tp.select_mixture(text.float(), visual.bfloat16(), 10, backend=backend), want)

    @pytest.mark.parametrize("floor", [-0.1, 0.6, NAN])
    def test_floor_out_of_range(self, backend, floor):
        with pytest.raises(ValueError, match="select_mixture: floor must"):
            tp.select_mixture(row(1, 2), row(1, 2), 1, floor=floor, backend=backend)


def literal_mixture(text: list[float], visual: list[float], k: int, floor: float) -> tuple[list[int], int]:
    """AdaFV's rule in plain Python, sentence by sentence from the contract."""

    def order(scores):
        return sorted(range(len(scores)), key=lambda i: (-scores[i], i))

    reserved = int(floor * k)
    rest = k - 2 * reserved
    by_text, by_visual = order(text), order(visual)

    def product(r):
        text_mass = sum(text[i] for i in by_text[reserved : reserved + r])
        return text_mass * sum(visual[i] for i in by_visual[reserved : reserved + rest - r])

    best = max(range(rest + 1), key=lambda r: (product(r), -r))
    chosen = {*by_text[: reserved + best], *by_visual[: reserved + rest - best]}
    share = [
        max(t / sum(text) if sum(text) else 0, v / sum(visual) if sum(visual) else 0)
        for t, v in zip(text, visual, strict=True)
    ]
    remaining = [i for i in order(share) if i not in chosen]
    chosen.update(remaining[: k - len(chosen)])
    return sorted(chosen), reserved + best


@over_backends
def test_mixture_follows_the_contract(backend):
    @settings(deadline=None, max_examples=25 if backend == "triton" else 150, print_blob=True)
    @given(data=st.data())
    def follows(data):
        n = data.draw(st.integers(1, 12))
        values = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 8.0]), min_size=n, max_size=n)
        text, visual = data.draw(values), data.draw(values)
        k = data.draw(st.integers(0, n + 2))
        floor = data.draw(st.sampled_from([0.0, 0.25, 0.5]))
        want, want_text = literal_mixture(text, visual, k, floor)
        indices, counts, num_text = tp.select_mixture(row(*text), row(*visual), k, floor=floor, backend=backend)
        assert indices.tolist() == [want + [-1] * (k - len(want))]
        assert counts.item() == len(want)
        assert num_text.item() == want_text

    follows()
