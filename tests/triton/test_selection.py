"""The Triton selections where they differ inside: one block or many, sorts in registers or in memory, launches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import NO_TRITON

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
if NO_TRITON is None:
    from tokenprune_kernels import triton as kernels
    from tokenprune_kernels.triton import mixture, radix, runtime

INF, NAN = math.inf, math.nan
SIZES = st.one_of(st.integers(0, 9000), st.integers(0, 2**31 - 1))


def check(op: str, *args, **kwargs) -> tuple[Tensor, ...]:
    got = getattr(tp, op)(*args, **kwargs, backend="triton")
    want = getattr(tp, op)(*args, **kwargs, backend="reference")
    for name, g, w in zip(("indices", "counts", "num_text"), got, want, strict=False):
        assert torch.equal(g, w), f"{name}: {g.tolist()} instead of {w.tolist()}"
    return got


def integers(batch: int, n: int, highest: int = 9) -> Tensor:
    """Scores whose sums are exact in any order."""
    return torch.randint(0, highest, (batch, n)).float()


@given(SIZES)
def test_blocks(n):
    config = radix.select_config(n)
    block = config.blocks["BLOCK_N"]
    assert block & (block - 1) == 0
    assert block >= min(n, radix.LARGEST_BLOCK)
    assert block == 256 or block < 2 * n
    assert 64 * config.num_warps <= block


@given(SIZES, SIZES)
def test_sort_in_registers(n, listed):
    listed = min(listed, n)
    config = mixture.list_config(n, listed)
    in_registers = config.blocks["SORTED"]
    assert config.blocks["BLOCK_N"] == radix.select_config(n).blocks["BLOCK_N"]
    assert config.num_warps <= 8
    if listed > mixture.LARGEST_SORT:
        assert in_registers == 0
    else:
        assert in_registers & (in_registers - 1) == 0
        assert max(listed, 32) <= in_registers < 2 * max(listed, 32)


@pytest.fixture
def launches(monkeypatch):
    """Launches are noted here and not carried out."""
    seen = []
    monkeypatch.setattr(runtime, "recorder", lambda kernel, grid, args, _: seen.append((kernel.__name__, grid, args)))
    return seen


@pytest.mark.parametrize("n", [0, 10, 4096, 4097])
def test_launches(launches, n):
    """One launch per op, two for the mixture; memory for keys only where a sample is more than one block."""
    scores = torch.zeros(3, n)
    kernels.select_topk(scores, 4)
    kernels.select_two_tailed(scores, torch.zeros(3, dtype=torch.int64), 4)
    kernels.mask_to_indices(scores > 0, 4)
    kernels.select_mixture(scores, scores, 4)
    assert [launch[:2] for launch in launches] == [
        ("select_kernel", (3,)), ("select_kernel", (3,)), ("mask_kernel", (3,)),
        ("list_kernel", (6,)), ("mixture_kernel", (3,)),
    ]  # fmt: skip
    assert [args[4] is None for name, _, args in launches if name == "select_kernel"] == [n <= 4096] * 2
    assert (launches[-1][2][1] is None) == (n <= 4096)


def test_no_samples_no_launch(launches):
    scores = torch.zeros(0, 5)
    assert kernels.select_topk(scores, 4)[0].shape == (0, 4)
    assert kernels.select_mixture(scores, scores, 4)[0].shape == (0, 4)
    assert not launches


def test_too_many_tokens(launches):
    scores = torch.zeros(1, 1).expand(1, 2**31)
    for call in (
        lambda: kernels.select_topk(scores, 4),
        lambda: kernels.select_two_tailed(scores, torch.zeros(1, dtype=torch.int64), 4),
        lambda: kernels.select_mixture(scores, scores, 4),
        lambda: kernels.mask_to_indices(torch.ones(1, 1, dtype=torch.bool).expand(1, 2**31), 4),
    ):
        with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens on a GPU, got 2147483648"):
            call()
    assert not launches


@pytest.mark.parametrize("n", [256, 257, 4096, 4097, 10_000])
def test_around_the_block_sizes(n):
    for scores in (torch.randn(1, n), integers(1, n, 3)):
        for k in (n // 3, n - 1, n + 3):
            check("select_topk", scores, k, largest=k % 2 == 0)
            check("select_two_tailed", scores, torch.tensor([k // 3]), k)
    check("mask_to_indices", scores == 1, n)
    check("mask_to_indices", scores == 1, n // 5)


@pytest.mark.parametrize("n", [600, 5000])
@pytest.mark.parametrize("spread", ["narrow", "softmax", "outlier", "neighbours", "negative"])
def test_spreads(n, spread):
    """What a histogram of digits can get wrong: all in one bin, one far away, keys that differ in one digit only."""
    scores = {
        "narrow": lambda: 1 + torch.rand(1, n) * 1e-6,
        "softmax": lambda: (torch.randn(1, n) * 4).softmax(-1),
        "outlier": lambda: torch.cat([torch.tensor([[INF, -1e30]]), torch.randn(1, n - 2)], -1),
        "neighbours": lambda: (0x3F800000 + (torch.randperm(n)[None] << 8) % 0x10000).int().view(torch.float32),
        "negative": lambda: -torch.rand(1, n),
    }[spread]()
    for k in (1, n // 5, n - 1):
        check("select_topk", scores, k)
        check("select_topk", scores.half(), k, largest=False)


def test_a_hundred_thousand_tokens():
    scores, mask = torch.rand(1, 100_000), torch.rand(1, 100_000) < 0.5
    check("select_topk", scores, 12_345, mask=mask)
    check("select_topk", torch.zeros(1, 100_000), 50_001, mask=mask)


@pytest.mark.parametrize("n", [300, 9000])
def test_both_tails_end_in_one_group_of_equals(n):
    """What the high tail leaves of a group goes to the low tail from the lowest index on."""
    scores = torch.full((4, n), 1.0)
    scores[:, ::7] = 2
    scores[:, 3::11] = NAN
    low = torch.tensor([0, 5, n // 2, n])
    check("select_two_tailed", scores, low, n // 2)
    check("select_two_tailed", scores, low, n - 2, mask=torch.rand(4, n) < 0.8)


@pytest.mark.parametrize(("n", "k"), [(40, 9), (700, 600), (2100, 2100), (3000, 2900), (4100, 700), (4500, 4000)])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_mixtures(n, k, floor):
    """A sort in registers or in memory, samples of one or two blocks; without a floor, both lists are k long."""
    mask = torch.rand(1, n) < 0.95
    check("select_mixture", integers(1, n, 50), integers(1, n, 1000).half(), k, floor=floor, mask=mask)


@pytest.mark.parametrize(("n", "k"), [(40, 38), (300, 250), (2500, 2300)])
def test_lists_that_run_out_of_mass(n, k):
    """Sums stay equal where zeros follow: the smallest of the equally good splits, whatever the rounding."""
    text, visual = torch.rand(1, n), torch.rand(1, n)
    text[torch.rand(1, n) > 0.2] = 0
    visual[torch.rand(1, n) > 0.2] = 0
    _, _, num_text = tp.select_mixture(text, visual, k, floor=0.0, backend="triton")
    assert num_text.tolist() == (text > 0).sum(-1).tolist()


@pytest.mark.parametrize("n", [37, 1000, 3001])
def test_prefix_sums_of_equal_scores(n):
    """0.1 + 0.1 + .. rounds, but alike in both lists: r and R - r tie, and the smaller one wins."""
    scores = torch.full((1, n), 0.1)
    _, _, num_text = tp.select_mixture(scores, scores, n - 1, floor=0.0, backend="triton")
    assert num_text.item() == (n - 1) // 2


def test_infinite_sums_have_no_shares():
    text, visual = torch.tensor([[INF, 1.0, 2, 3, 4, 5, 6]]), torch.tensor([[INF, 1.0, 1, 1, 9, 1, 1]])
    for other in (visual, visual.clamp_max(9), torch.zeros_like(visual)):
        for k in (3, 6):
            check("select_mixture", text, other, k)
            check("select_mixture", other, text, k)


def test_equal_shares_of_both_lists_tie():
    """1 / 3 of the text list against 3 / 9 and 2 / 6 of the visual one: the lowest index of all wins."""
    text = torch.tensor([[0.0, 1, 0, 1, 0, 1, 0]])
    for scale in (2, 3):
        visual = torch.tensor([[1.0, 0, 1, 0, 1, 0, 0]]) * scale
        for k in (1, 3, 4):
            check("select_mixture", text, visual, k, floor=0.0)


def test_a_large_k_costs_no_more_than_the_list():
    text, visual = integers(1, 20), integers(1, 20)
    indices, counts, num_text = tp.select_mixture(text, visual, 20_000, floor=0.25, backend="triton")
    assert counts.item() == 20
    assert indices[0, :20].tolist() == list(range(20))
    assert indices[0, 20:].eq(-1).all()
    assert num_text.item() == 5_000  # no list has anything left after the reserved part: r = 0


@settings(deadline=None, max_examples=15, print_blob=True)
@given(st.integers(1, 70), st.integers(0, 80), st.sampled_from([0, 0.1, 0.25, 0.5]), st.integers(0, 2**31))
def test_special_values(n, k, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, -1.0, 1.0, 2.0, 3.0, NAN, INF, -INF, 0.5])

    def scores() -> Tensor:
        kinds = int(torch.randint(3, 11, (), generator=generator))
        return values[torch.randint(0, kinds, (1, n), generator=generator)]

    text, visual = scores(), scores()
    mask = torch.rand(1, n, generator=generator) < 0.6
    check("select_mixture", text, visual, k, floor=floor, mask=mask)
    check("select_topk", text, k, mask=mask)
    check("select_two_tailed", text, torch.randint(-2, k + 3, (1,), generator=generator), k, mask=mask)
