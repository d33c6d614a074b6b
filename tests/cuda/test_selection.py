"""The selection kernels on the CUDA emulator: launches, regimes, boundaries between threads, warps and blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
NAN, INF = float("nan"), float("inf")
KERNELS = {"select_topk": "select_kernel", "select_two_tailed": "select_kernel", "mask_to_indices": "mask_kernel"}
# Capability, bytes of shared memory per block, multiprocessors.
DEVICES = st.sampled_from(
    [(80, 163 * 1024, 108), (86, 99 * 1024, 84), (89, 99 * 1024, 128), (90, 227 * 1024, 132), (120, 99 * 1024, 170)]
)


def assert_selects_as_the_reference(scores: Tensor, k: int, mask: Tensor | None = None, low: int | None = None) -> None:
    """Every op, with the indices and counts of the reference, in one launch each."""
    num_low = torch.full((len(scores),), k // 3 if low is None else low)
    calls = [
        ("select_topk", (scores, k), {"mask": mask}),
        ("select_topk", (scores, k), {"mask": mask, "largest": False}),
        ("select_two_tailed", (scores, num_low, k), {"mask": mask}),
        ("mask_to_indices", (scores > 0, k), {}),
    ]
    for name, args, kwargs in calls:
        module.take_launches()
        got = getattr(tp, name)(*args, **kwargs, backend="emulator")
        launches = [launch["kernel"].split("<")[0] for launch in module.take_launches()]
        assert launches == ([KERNELS[name]] if len(scores) else []), name
        for g, want in zip(got, getattr(tp.reference, name)(*args, **kwargs), strict=True):
            assert torch.equal(g, want), f"{name} {kwargs}:\n{g}\nexpected\n{want}"


def take_launch() -> dict:
    (launch,) = module.take_launches()
    return launch


# --- regimes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("shared", [8 * 1024, 227 * 1024])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 640, 1023, 1024, 1025, 2100])
def test_boundaries_of_lanes_warps_and_blocks(n, shared, architecture):
    """With 8 KB, keys of more than 512 tokens do not fit: every pass reads the scores again."""
    module.settings().shared_per_block = shared
    module.settings().architecture = architecture
    scores = torch.randn(2, n)
    for k in sorted({0, 1, n // 2, n, n + 3}):
        assert_selects_as_the_reference(scores, k)
    tp.select_topk(scores, 3, backend="emulator")
    launch = module.take_launches()[-1]
    kept = shared > 8 * 1024 or n <= 512
    assert launch["kernel"] == f"select_kernel<float, {str(kept).lower()}>"
    assert launch["shared"] == (4 * -(-n // 32) * 32 if kept else 0)


@pytest.mark.parametrize("shared", [16 * 1024, 227 * 1024])
@pytest.mark.parametrize(("n", "cluster"), [(16384, 1), (16385, 2), (32768, 2), (32769, 4), (65536, 4), (65537, 8)])
def test_long_rows_are_spread_over_a_cluster(n, cluster, shared):
    module.settings().shared_per_block = shared
    dtype, name = (torch.bfloat16, "__nv_bfloat16") if n > 20000 else (torch.float16, "__half")
    scores = torch.randn(1, n).to(dtype)  # many ties
    scores[0, ::7] = NAN
    assert_selects_as_the_reference(scores, n // 5)
    tp.select_topk(scores, 1, backend="emulator")
    launch = take_launch()
    assert (launch["cluster"], launch["grid"], launch["block"]) == (cluster, (cluster, 1, 1), (512, 1, 1))
    assert launch["kernel"] == f"select_kernel<{name}, {str(shared > 16 * 1024).lower()}>"


@pytest.mark.parametrize(("architecture", "sm_count", "batch"), [(89, 132, 1), (90, 15, 2), (90, 7, 1)])
def test_a_full_or_old_device_gets_smaller_clusters(architecture, sm_count, batch):
    module.settings().architecture = architecture
    module.settings().sm_count = sm_count
    scores = torch.randint(-40, 40, (batch, 70_000)).bfloat16()
    assert_selects_as_the_reference(scores, 3000)
    tp.mask_to_indices(scores > 0, 9, backend="emulator")
    assert take_launch()["cluster"] == (1 if architecture < 90 else 4)


def test_a_million_tokens():
    scores = torch.randn(1, 1_000_003)
    mask = torch.rand(1, 1_000_003) < 0.9
    want = tp.reference.select_topk(scores, 4000, mask=mask)
    got = tp.select_topk(scores, 4000, mask=mask, backend="emulator")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    launch = take_launch()
    assert (launch["kernel"], launch["cluster"]) == ("select_kernel<float, false>", 8)


@pytest.mark.parametrize("n", [700, 17000])
@pytest.mark.parametrize("shared", [8 * 1024, 227 * 1024])
def test_schedules_give_the_same_bits(n, shared):
    module.settings().shared_per_block = shared
    scores = torch.randint(0, 9, (2, n)).float()
    low = torch.tensor([5, n // 3])
    results = []
    for schedule in (module.Schedule.forward, module.Schedule.reversed, module.Schedule.shuffled):
        module.settings().schedule = schedule
        results.append(
            [
                *tp.select_topk(scores, n // 2, backend="emulator"),
                *tp.select_two_tailed(scores, low, n // 2, backend="emulator"),
                *tp.mask_to_indices(scores > 4, n // 3, backend="emulator"),
                tp.score_entropy(scores, backend="emulator"),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_has_its_rank(dtype):
    """All bit patterns, in random order: denormals, infinities, both zeros, and every NaN equally bad."""
    module.settings().architecture = 80  # one block: fewer threads to emulate
    scores = torch.randperm(65536).sub(32768).to(torch.int16).view(dtype).view(1, -1)
    for k in (400, 32000, 64000):
        assert_selects_as_the_reference(scores, k)


def test_32_bit_values_of_every_magnitude():
    scores = torch.randint(-(2**31), 2**31, (2, 5000), dtype=torch.int64).to(torch.int32).view(torch.float32)
    for k in (1, 700, 4900, 5000):
        assert_selects_as_the_reference(scores, k)


@pytest.mark.parametrize("shared", [8 * 1024, 227 * 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", ["uniform", "narrow", "softmax", "equal", "outlier", "decreasing"])
def test_spreads_of_scores(spread, dtype, shared):
    """What a histogram of keys can get wrong: all in one bin, one value far away, only ties."""
    module.settings().shared_per_block = shared
    n = 3000
    scores = {
        "uniform": lambda: torch.rand(1, n),
        "narrow": lambda: 1 + torch.rand(1, n) * 1e-6,
        "softmax": lambda: (torch.randn(1, n) * 4).softmax(-1),
        "equal": lambda: torch.full((1, n), 0.25),
        "outlier": lambda: torch.cat([torch.tensor([[INF, -1e30]]), torch.rand(1, n - 2)], -1),
        "decreasing": lambda: torch.linspace(5, -5, n).view(1, n),
    }[spread]().to(dtype)
    for k in (1, n // 5, n - 1):
        assert_selects_as_the_reference(scores, k)


VALUES = (0.0, -0.0, 1.0, 2.0, 0.5, -1.0, -2.0, INF, -INF, NAN, 2.0**-20, -(2.0**-20))


@settings(deadline=None, max_examples=120, print_blob=True)
@given(data=st.data())
def test_ties_within_and_between_the_tails(data):
    """Few different values: the tails end within a group of equal scores, and among the NaN."""
    batch, n = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([0, 3, 33, 70, 200, 700]))
    k, low = data.draw(st.integers(0, n + 5)), data.draw(st.integers(-2, n + 7))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    module.settings().shared_per_block = data.draw(st.sampled_from([8 * 1024, 227 * 1024]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    pool = torch.tensor(data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=6)))
    scores = pool[torch.randint(0, len(pool), (batch, n), generator=generator)].to(dtype)
    density = data.draw(st.sampled_from([0.0, 0.2, 0.9, None]))
    mask = None if density is None else torch.rand(batch, n, generator=generator) < density
    assert_selects_as_the_reference(scores, k, mask, low)


# --- the entropy of scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 127, 576, 2049, 16384])
def test_entropy_of_a_sample_does_not_depend_on_its_batch(n):
    scores = torch.rand(5, n)
    mask = torch.rand(5, n) < 0.7
    together = tp.score_entropy(scores, mask=mask, backend="emulator")
    assert take_launch()["grid"] == (5, 1, 1)
    alone = [tp.score_entropy(scores[i : i + 1], mask=mask[i : i + 1], backend="emulator") for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["select_topk", "select_two_tailed", "mask_to_indices", "score_entropy"])
def test_a_failing_launch_is_reported(op):
    arguments = {
        "select_topk": (torch.ones(1, 5), 2),
        "select_two_tailed": (torch.ones(1, 5), torch.ones(1, dtype=torch.int64), 2),
        "mask_to_indices": (torch.ones(1, 5, dtype=torch.bool), 2),
        "score_entropy": (torch.ones(1, 5),),
    }[op]
    module.settings().fail_launch = 1
    with pytest.raises(RuntimeError, match=rf"tokenprune::{op}: CUDA error cudaErrorInvalidValue .* \[1, 5\]"):
        getattr(tp, op)(*arguments, backend="emulator")


def test_a_gpu_without_a_binary_is_told_of_triton():
    module.settings().fail_launch, module.settings().fail_status = 1, 209
    with pytest.raises(RuntimeError, match=r"cudaErrorNoKernelImageForDevice .*backend triton has kernels"):
        tp.score_entropy(torch.ones(1, 5), backend="emulator")


@pytest.mark.parametrize("op", ["select_topk", "select_two_tailed", "mask_to_indices", "score_entropy"])
def test_more_tokens_than_counters_hold_are_refused(op):
    """An expanded tensor: nothing of that size is allocated."""
    scores = torch.zeros(1, 1).expand(1, 2**31)
    arguments = {
        "select_topk": (scores, 2),
        "select_two_tailed": (scores, torch.ones(1, dtype=torch.int64), 2),
        "mask_to_indices": (torch.zeros(1, 1, dtype=torch.bool).expand(1, 2**31), 2),
        "score_entropy": (scores,),
    }[op]
    with pytest.raises((RuntimeError, ValueError), match=rf"{op}: \w+ must have fewer than 2\^31 tokens on a GPU"):
        getattr(torch.ops.tokenprune_emulated, op)(*arguments)


# --- planners --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=500, print_blob=True)
@given(device=DEVICES, batch=st.integers(0, 2**31 - 1), n=st.integers(0, 2**31 - 1), small=st.booleans())
def test_plans_fit_the_device(device, batch, n, small):
    if small:
        batch, n = batch % 300, n % 500_000
    limits = module.DeviceLimits()
    limits.architecture, limits.shared_per_block, limits.sm_count = device
    plan, of_mask = module.plan_select(batch, n, limits), module.plan_mask(batch, n, limits)
    assert plan.cluster in ((1, 2, 4, 8) if limits.architecture >= 90 else (1,))
    assert plan.cluster * batch < 2**31
    assert plan.cluster == 1 or plan.cluster * batch <= limits.sm_count
    assert 128 <= plan.threads <= 512
    assert plan.threads % 32 == 0
    tokens = -(-n // plan.cluster)  # of a block, before they are rounded up to whole warps
    assert plan.shared == (-(-tokens // 32) * 32 * 4 if plan.keys_in_shared else 0)
    assert plan.shared + module.SELECT_STATIC_SHARED <= limits.shared_per_block
    assert plan.keys_in_shared or 4 * (tokens + 31) + module.SELECT_STATIC_SHARED > limits.shared_per_block
    assert (of_mask.cluster, of_mask.threads, of_mask.shared) == (plan.cluster, plan.threads, 0)


def test_a_plan_depends_on_the_row_only_while_rows_are_short():
    """Up to 16384 tokens a sample is computed in the same way in every batch; the entropy always is."""
    limits = module.DeviceLimits()
    for n in (0, 1, 576, 4096, 16384):
        plans = [module.plan_select(batch, n, limits) for batch in (1, 8, 1000)]
        assert len({(p.cluster, p.threads, p.shared) for p in plans}) == 1
    threads = [module.plan_entropy_threads(n) for n in (0, 1, 513, 2048, 2**31 - 1)]
    assert threads == [128, 128, 160, 512, 512]
