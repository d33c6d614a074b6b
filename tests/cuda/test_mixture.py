"""select_mixture on the CUDA emulator: one launch, where its lists lie, its prefix sums, its planner."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR, dtypes_of

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
DTYPES = dtypes_of("emulator")
INF, NAN = math.inf, math.nan


def mixture(text: Tensor, visual: Tensor, k: int, **arguments) -> tuple[Tensor, ...]:
    return tp.select_mixture(text, visual, k, **arguments, backend="emulator")


def check(text: Tensor, visual: Tensor, k: int, *, backend: str = "reference", **arguments) -> tuple[Tensor, ...]:
    got = mixture(text, visual, k, **arguments)
    want = tp.select_mixture(text, visual, k, **arguments, backend=backend)
    for name, g, w in zip(("indices", "counts", "num_text"), got, want, strict=True):
        assert torch.equal(g, w), f"{name}: {g.tolist()} instead of {w.tolist()}"
    return got


def integers(batch: int, n: int, highest: int = 9) -> Tensor:
    """Scores whose sums are exact in any order."""
    return torch.randint(0, highest, (batch, n)).float()


@pytest.mark.parametrize("n", [1, 31, 32, 33, 255, 300, 1100])
def test_one_launch_of_one_block_per_sample(n):
    for k in (0, 1, n // 3, n, n + 5):
        check(integers(2, n), integers(2, n), k, mask=torch.rand(2, n) < 0.8)
        launches = module.take_launches()
        assert len(launches) == 1
        assert launches[0]["grid"] == (2, 1, 1)
        threads = -(-n // 64) * 32  # two tokens each
        assert launches[0]["block"] == (min(512, max(128, threads)), 1, 1)


@pytest.mark.parametrize(("n", "k", "shared", "lists_in_shared", "keys_in_shared"), [
    (700, 200, 227, True, True), (700, 60, 15, True, False), (700, 650, 18, False, True), (700, 650, 12, False, False),
])  # fmt: skip
def test_where_lists_and_keys_lie(n, k, shared, lists_in_shared, keys_in_shared):
    module.settings().shared_per_block = shared * 1024
    limits = module.DeviceLimits()
    limits.shared_per_block = shared * 1024
    plan = module.plan_mixture(n, k, k // 4, limits)
    assert (plan.lists_in_shared, plan.keys_in_shared) == (lists_in_shared, keys_in_shared)
    text, visual, mask = integers(3, n, 50), integers(3, n, 50), torch.rand(3, n) < 0.95
    got = check(text, visual, k, mask=mask)
    (launch,) = module.take_launches()
    assert launch["shared"] == plan.bytes(True)
    module.settings().reset()
    assert all(torch.equal(a, b) for a, b in zip(got, mixture(text, visual, k, mask=mask), strict=True))


def test_every_schedule_gives_the_same():
    text, visual, mask = torch.rand(2, 300), torch.rand(2, 300).half(), torch.rand(2, 300) < 0.9
    for shared in (227, 12):
        results = []
        for schedule in (module.Schedule.forward, module.Schedule.reversed, module.Schedule.shuffled):
            module.settings().shared_per_block = shared * 1024
            module.settings().schedule = schedule
            results.append(mixture(text, visual, 150, mask=mask))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("of_text", DTYPES)
@pytest.mark.parametrize("of_visual", DTYPES)
def test_all_pairs_of_dtypes_and_strides(of_text, of_visual):
    text = integers(60, 3).to(of_text).T
    visual = integers(3, 121).to(of_visual)[:, 1:].view(3, 60, 2)[..., 0]
    mask = (torch.rand(60, 3) < 0.7).T
    check(text, visual, 20, mask=mask)
    check(integers(3, 61).to(of_text)[:, 1:], integers(1, 60).to(of_visual).expand(3, 60), 20)


def with_specials(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    values = torch.tensor([0.0, -0.0, -1.0, 1.0, 2.0, 3.0, NAN, INF, -INF, 0.5])
    kinds = torch.randint(0, int(torch.randint(3, 11, (), generator=generator)), shape, generator=generator)
    return values[kinds]


@hypothesis_settings(deadline=None, max_examples=60, print_blob=True)
@given(
    st.integers(1, 70), st.integers(0, 80), st.sampled_from([0, 0.1, 0.25, 0.5]), st.booleans(), st.integers(0, 2**31)
)
def test_special_values_as_the_reference(n, k, floor, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    text, visual = with_specials((2, n), generator), with_specials((2, n), generator)
    mask = torch.rand(2, n, generator=generator) < 0.6 if masked else None
    check(text, visual, k, floor=floor, mask=mask)


def test_infinite_sums_have_no_shares():
    # The fill sees neither list's shares, or only one's: then the lowest index or that list alone decides.
    text, visual = torch.tensor([[INF, 1.0, 2, 3, 4, 5, 6]]), torch.tensor([[INF, 1.0, 1, 1, 9, 1, 1]])
    for other in (visual, visual.clamp_max(9), torch.zeros_like(visual)):
        for k in range(1, 8):
            check(text, other, k)
            check(other, text, k)


def test_equal_shares_of_both_lists_tie():
    # 1 / 3 of the text list against 3 / 9 and 2 / 6 of the visual one: the lowest index of all must win.
    text = torch.tensor([[0.0, 1, 0, 1, 0, 1, 0]])
    for scale in (1, 2, 3, 7):
        visual = torch.tensor([[1.0, 0, 1, 0, 1, 0, 0]]) * scale
        for k in range(8):
            check(text, visual, k, floor=0.0)
            check(visual, text, k, floor=0.0)


@pytest.mark.parametrize(("n", "k"), [(40, 38), (300, 250), (2500, 2300)])
def test_lists_that_run_out_of_mass(n: int, k: int):
    """Prefix sums stay equal where zeros follow: the smallest of the equally good splits, whatever the rounding."""
    for share in (0.1, 0.3):
        text, visual = torch.rand(2, n), torch.rand(2, n)
        text[torch.rand(2, n) > share] = 0
        visual[torch.rand(2, n) > share] = 0
        _, _, num_text = check(text, visual, k, floor=0.0, backend="cpu")
        assert num_text.tolist() == (text > 0).sum(-1).tolist()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 36), (1000, 999)])
def test_prefix_sums_of_equal_scores(n: int, k: int):
    """0.1 + 0.1 + ... rounds, but alike in both lists: r and rest - r tie, and the smaller one wins."""
    scores = torch.full((1, n), 0.1)
    _, _, num_text = mixture(scores, scores, k, floor=0.0)
    assert num_text.item() == k // 2


def test_random_scores_as_the_cpu():
    for n, k in [(33, 9), (200, 64), (577, 128), (1030, 600)]:
        for floor in (0.0, 0.25, 0.5):
            text, visual = torch.rand(2, n).softmax(-1), torch.randn(2, n).mul(3).softmax(-1)
            check(text, visual, k, floor=floor, backend="cpu")
            check(text.bfloat16(), visual.half(), k, floor=floor, mask=torch.rand(2, n) < 0.7, backend="cpu")


def test_large_k_costs_no_more_than_the_list():
    text, visual = integers(1, 20), integers(1, 20)
    indices, counts, num_text = mixture(text, visual, 10**6, floor=0.25)
    assert counts.item() == 20
    assert indices[0, :20].tolist() == list(range(20))
    assert indices[0, 20:].eq(-1).all()
    assert num_text.item() == 250_000  # no list has anything left after the reserved part: r = 0


SIZES = st.one_of(st.integers(0, 5000), st.integers(0, 1 << 20), st.integers(0, (1 << 31) - 1))


@hypothesis_settings(deadline=None, max_examples=300, print_blob=True)
@given(SIZES, SIZES, st.sampled_from([0, 0.1, 0.25, 0.5]), st.sampled_from([16, 48, 99, 163, 227]))
def test_planner(n: int, k: int, floor: float, shared: int):
    limits = module.DeviceLimits()
    limits.shared_per_block = shared * 1024
    reserved = math.floor(floor * k)
    plan = module.plan_mixture(n, k, reserved, limits)
    assert plan.threads % 32 == 0
    assert 128 <= plan.threads <= 512
    listed = min(k - reserved, n)
    assert plan.sorted >= max(listed, 2)
    assert plan.sorted & (plan.sorted - 1) == 0
    assert plan.sorted < 2 * max(listed, 2)
    assert plan.sorted <= 1 << 31
    assert plan.summed == max(listed - reserved, 0)
    assert plan.list_bytes == 2 * (4 * plan.sorted + 8 * (plan.summed + 1))
    assert plan.list_bytes % 8 == 0
    assert plan.bytes(True) + module.MIXTURE_STATIC_SHARED <= limits.shared_per_block
    assert plan.bytes(True) == plan.lists_in_shared * plan.list_bytes + plan.keys_in_shared * 8 * n
    assert plan.bytes(True) + plan.bytes(False) == plan.list_bytes + 8 * n
    assert plan.workspace_bytes(3) == 3 * plan.bytes(False)
