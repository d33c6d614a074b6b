"""The kernel of select_grouped_topk on the CUDA emulator: what shared memory holds, passes, clusters, planners."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR

from .test_selection import DEVICES, INF, NAN, take_launch

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None


def assert_groups_as_on_the_cpu(scores: Tensor, groups: Tensor, budgets: Tensor, k: int, **options: Any) -> dict:
    """The indices and counts of the CPU kernel, which sorts by group, in one launch; returns that."""
    module.take_launches()
    got = tp.select_grouped_topk(scores, groups, budgets, k, **options, backend="emulator")
    launch = take_launch()
    want = tp.select_grouped_topk(scores, groups, budgets, k, **options, backend="cpu")
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w), f"{g}\nexpected\n{w}"
    return launch


def grouped(batch: int, n: int, count: int, most: int, levels: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (few different ones with `levels`), groups of any order, and budgets of -1 to `most`."""
    scores = torch.randint(-levels, levels + 1, (batch, n)).float() if levels else torch.randn(batch, n)
    return scores, torch.randint(-1, count + 1, (batch, n)), torch.randint(-1, most + 1, (batch, count))


# KB of shared memory, of which 6 are taken, tokens, groups; what the others hold: tokens (8 bytes each) and tables (48
# to 1040 bytes per group), tables alone, or nothing.
HELD = [(227, 576, 5, "all"), (16, 576, 5, "all"), (16, 700, 5, "tables"), (16, 2000, 9, "tables"),
        (16, 100, 200, "tables"), (16, 300, 214, "none"), (227, 4000, 4714, "tables"), (227, 4000, 4715, "none"),
        (227, 9000, 4715, "none")]  # fmt: skip


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("shared", "n", "count", "held"), HELD)
@pytest.mark.parametrize("levels", [0, 2])
def test_what_shared_memory_holds_of_the_groups(shared, n, count, held, levels, architecture):
    settings = module.settings()
    settings.shared_per_block, settings.architecture = shared * 1024, architecture
    limits = module.DeviceLimits()
    limits.shared_per_block, limits.architecture = shared * 1024, architecture
    plan = module.plan_grouped(2, n, count, limits)
    assert plan.memory == getattr(module.GroupedMemory, held)
    launch = assert_groups_as_on_the_cpu(*grouped(2, n, count, max(4, 2 * n // count), levels), n // 3)
    assert launch["kernel"].startswith("select_grouped_kernel<float")
    assert (launch["shared"], launch["cluster"]) == (plan.shared, plan.cluster)
    assert (plan.shared == 0) == (held == "none")
    assert (plan.workspace_bytes > 0) == (held == "none")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "count"), [(576, 5), (700, 5), (300, 214)])
def test_groups_of_16_bits_in_every_kind_of_memory(n, count, dtype):
    module.settings().shared_per_block = 16 * 1024
    scores, *others = grouped(2, n, count, max(4, 2 * n // count), 5)
    assert_groups_as_on_the_cpu(scores.to(dtype), *others, n // 3)


@pytest.mark.parametrize(("n", "count", "cluster"), [(8192, 3, 1), (8193, 40, 2), (16385, 900, 4), (32769, 1, 8)])
@pytest.mark.parametrize("shared", [64, 227])
def test_groups_of_long_rows_are_spread_over_a_cluster(n, count, cluster, shared):
    module.settings().shared_per_block = shared * 1024
    scores, *others = grouped(1, n, count, 2 * n // count, 50)
    scores[0, ::7] = NAN
    launch = assert_groups_as_on_the_cpu(scores.bfloat16(), *others, n // 2)
    assert (launch["cluster"], launch["grid"], launch["block"]) == (cluster, (cluster, 1, 1), (512, 1, 1))


@pytest.mark.parametrize("count", [1, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 2100])
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_width_of_a_pass(count, architecture):
    """1 to 32 threads look for the bin of a group; more groups than a block takes at once; in one block and in two."""
    module.settings().architecture = architecture
    digit = max(3, min(8, 14 - (count - 1).bit_length()))
    assert module.plan_grouped(1, 9000, count, module.DeviceLimits()).digit == digit
    for n, levels in ((9000, 0), (700, 3)):
        assert_groups_as_on_the_cpu(*grouped(1, n, count, max(3, n // count), levels), n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("largest", [True, False])
def test_every_16_bit_value_in_groups(dtype, largest):
    scores = torch.randperm(65536).sub(32768).to(torch.int16).view(dtype).view(1, -1)
    _, groups, budgets = grouped(1, 65536, 11, 9000)
    assert_groups_as_on_the_cpu(scores, groups, budgets, 40000, largest=largest)


@pytest.mark.parametrize("spread", ["equal", "narrow", "outlier", "nan", "decreasing"])
@pytest.mark.parametrize("neighbours", [True, False])
def test_spreads_of_scores_in_groups(spread, neighbours):
    """One bin for all, one value far away, nothing but positions to tell tokens apart; frames in order, or mixed."""
    n, count = 3000, 10
    scores = {
        "equal": torch.full((1, n), 0.25),
        "narrow": 1 + torch.rand(1, n) * 1e-6,
        "outlier": torch.cat([torch.tensor([[INF, -INF]]), torch.rand(1, n - 2)], -1),
        "nan": torch.where(torch.rand(1, n) < 0.7, NAN, torch.rand(1, n)),
        "decreasing": torch.linspace(5, -5, n).view(1, n),
    }[spread]
    order = torch.arange(n)
    groups = (order // 300 if neighbours else order % count)[None]
    budgets = torch.tensor([[0, 1, 2, 150, 299, 300, 301, 2**62, -(2**63), 31]])
    for k in (5, n):
        for largest in (True, False):
            assert_groups_as_on_the_cpu(scores, groups, budgets, k, largest=largest, mask=torch.rand(1, n) < 0.95)


@pytest.mark.parametrize(("n", "count", "shared"), [(700, 30, 227), (9000, 30, 227), (9000, 400, 16), (20000, 5, 227)])
def test_schedules_give_the_same_groups(n, count, shared):
    given = grouped(2, n, count, n // count, 4)
    for schedule in (module.Schedule.forward, module.Schedule.reversed, module.Schedule.shuffled):
        module.settings().shared_per_block, module.settings().schedule = shared * 1024, schedule
        assert_groups_as_on_the_cpu(*given, n // 2)


def test_groups_and_budgets_of_any_strides():
    scores, groups, budgets = grouped(3, 500, 7, 60, 5)
    mask = torch.rand(500, 3) < 0.8
    views = [scores.T.contiguous().T, groups.T.contiguous().T, budgets.repeat_interleave(2, -1)[:, ::2]]
    assert_groups_as_on_the_cpu(*views, 200, mask=mask.T)
    assert_groups_as_on_the_cpu(scores, groups[:1].expand(3, 500), budgets[:1].expand(3, 7), 200)


@pytest.mark.parametrize(("n", "count", "k"), [(0, 3, 4), (5, 0, 4), (0, 0, 0), (1, 1, 2), (33, 2, 0)])
def test_groups_of_nothing(n, count, k):
    assert_groups_as_on_the_cpu(*grouped(2, n, count, 3), k)
    no_samples = [t[:0] for t in grouped(1, 5, 2, 3)]
    indices, counts = tp.select_grouped_topk(*no_samples, k, backend="emulator")
    assert (indices.shape, counts.shape) == ((0, k), (0,))


def test_a_failing_launch_of_groups_is_reported():
    module.settings().fail_launch = 1
    with pytest.raises(
        RuntimeError, match=r"select_grouped_topk: CUDA error .* scores \[1, 5\] float32, budgets \[1, 2"
    ):
        tp.select_grouped_topk(*grouped(1, 5, 2, 1), 3, backend="emulator")


@pytest.mark.parametrize("of_tokens", [True, False])
def test_more_tokens_or_groups_than_counters_hold_are_refused(of_tokens):
    """Expanded tensors: nothing of that size is allocated."""
    n, count, expected = (2**31, 1, "scores must have fewer than 2^31 tokens") if of_tokens else (
        1, 2**31, "budgets must have fewer than 2^31 groups")  # fmt: skip
    given = torch.zeros(1, 1).expand(1, n), torch.zeros(1, 1, dtype=torch.int64).expand(1, n)
    budgets = torch.ones(1, 1, dtype=torch.int64).expand(1, count)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(f"select_grouped_topk: {expected} on a GPU")):
        torch.ops.tokenprune_emulated.select_grouped_topk(*given, budgets, 2)


@settings(deadline=None, max_examples=500, print_blob=True)
@given(
    device=DEVICES, batch=st.integers(0, 2**31 - 1), n=st.integers(0, 2**31 - 1), small=st.booleans(),
    count=st.one_of(st.integers(0, 5000), st.integers(0, 2**31 - 1)),
)  # fmt: skip
def test_plans_of_groups_fit_the_device(device, batch, n, small, count):
    if small:
        batch, n = batch % 300, n % 500_000
    limits = module.DeviceLimits()
    limits.architecture, limits.shared_per_block, limits.sm_count = device
    plan, memory = module.plan_grouped(batch, n, count, limits), module.GroupedMemory
    assert plan.cluster in ((1, 2, 4, 8) if limits.architecture >= 90 else (1,))
    assert plan.cluster == 1 or (plan.cluster * batch <= limits.sm_count and n > 4096 * plan.cluster)
    assert 128 <= plan.threads <= 512
    assert plan.threads % 32 == 0
    assert 3 <= plan.digit <= 8
    assert plan.digit == 3 or count << plan.digit <= 16384
    room, tables = limits.shared_per_block - module.SELECT_STATIC_SHARED, count * (16 + (4 << plan.digit))
    tokens = -(-n // plan.cluster)  # of a block, before they are rounded up to whole warps
    everything = tables + 8 * 32 * -(-tokens // 32)
    held = memory.all if everything <= room else memory.tables if tables <= room else memory.none
    assert plan.memory == held
    assert plan.shared == {memory.all: everything, memory.tables: tables, memory.none: 0}[held]
    assert plan.workspace_bytes == (tables if held == memory.none else 0)
    if plan.digit < 8:  # one bit more would have been too many counters, or too many bytes
        assert count << plan.digit + 1 > 16384 or count * (16 + (8 << plan.digit)) > room
