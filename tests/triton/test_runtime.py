"""What the Triton kernels share: candidate keys, launches, the choice of a target, and when Triton serves at all."""

import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing import gpu_backend
from testing.cases import NO_TRITON
from testing.op_samples import SAMPLES
from testing.process import printed
from tokenprune_kernels import _triton

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
if NO_TRITON is None:
    import triton
    import triton.language as tl

    import tokenprune_kernels.triton as kernels
    from tokenprune_kernels.triton import runtime
    from tokenprune_kernels.triton.order import index_of, key_with_index, order_key

TRITON_OPS = set(_triton.served())
DEVICE = "cuda" if gpu_backend.has_gpu() else "cpu"  # the interpreter runs on the CPU
BLOCK = 64


def without_interpreter(*arguments: str, **environment: str) -> str:
    return printed(*arguments, TRITON_INTERPRET="0", **environment)


# --- keys -----------------------------------------------------------------------------------------------------------

if NO_TRITON is None:

    @triton.jit
    def keys_kernel(value_ptr, valid_ptr, key_ptr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
        lane = tl.arange(0, BLOCK)
        valid = tl.load(valid_ptr + lane) != 0
        tl.store(key_ptr + lane, order_key(tl.load(value_ptr + lane), valid, LARGEST).to(tl.int64))

    @triton.jit
    def best_kernel(key_ptr, index_ptr, best_ptr, n, BLOCK: tl.constexpr):  # noqa: N803
        lane = tl.arange(0, BLOCK)
        key = tl.load(key_ptr + lane, mask=lane < n, other=0).to(tl.uint32)
        index = tl.load(index_ptr + lane, mask=lane < n, other=0)
        both = key_with_index(key, index)
        tl.store(best_ptr + lane, index_of(both), mask=lane < n)
        tl.store(best_ptr + n, index_of(tl.max(both, 0)))


def keys_of(values: Tensor, valid: Tensor, largest: bool) -> Tensor:
    padded = torch.zeros(BLOCK, device=DEVICE).copy_(torch.nn.functional.pad(values, (0, BLOCK - len(values))))
    counts = torch.nn.functional.pad(valid, (0, BLOCK - len(valid))).to(DEVICE).view(torch.uint8)
    keys = torch.empty(BLOCK, dtype=torch.int64, device=DEVICE)
    config = runtime.Config({"BLOCK": BLOCK})
    runtime.launch(keys_kernel, (1,), keys, padded, counts, keys, config=config, LARGEST=largest)
    return keys[: len(values)].cpu()


def from_bits(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits


SPECIAL = (
    0x00000000, 0x80000000,  # zeros
    0x7F800000, 0xFF800000,  # infinities
    0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FA5A5A5,  # NaN, quiet and signalling, with payloads
    0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF,  # subnormals
    0x00800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF,
)  # fmt: skip
floats = st.one_of(st.sampled_from(SPECIAL), st.integers(0, (1 << 32) - 1))
candidates = st.lists(st.tuples(floats, st.booleans()), min_size=1, max_size=BLOCK)


@settings(deadline=None, max_examples=150)
@example([(bits, True) for bits in SPECIAL], True)
@example([(bits, True) for bits in SPECIAL], False)
@given(candidates, st.booleans())
def test_keys_sort_as_the_contract_orders_candidates(drawn: list[tuple[int, bool]], largest: bool) -> None:
    values = torch.tensor([from_bits(bits) for bits, _ in drawn], dtype=torch.int32).view(torch.float32)
    valid = torch.tensor([v for _, v in drawn])
    keys = keys_of(values, valid, largest)
    best_first = sorted(range(len(drawn)), key=lambda i: (-int(keys[i]), i))
    tokens = int(valid.sum())
    assert best_first[:tokens] == tp.reference._common.candidate_order(values, valid, largest)[:tokens].tolist()
    assert (keys[~valid] == 0).all()
    assert (keys[valid & values.isnan()] == 1).all()
    assert ((keys[valid & ~values.isnan()] > 1) & (keys[valid & ~values.isnan()] < 1 << 32)).all()


def test_equal_values_have_equal_keys_and_neighbours_different_ones() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, 1.0 + 2**-23, 2.0**-149, -(2.0**-149)])
    for largest in (True, False):
        zero, minus_zero, one, same, above, tiny, minus_tiny = keys_of(values, torch.ones(7).bool(), largest).tolist()
        assert zero == minus_zero
        assert one == same
        assert len({zero, one, above, tiny, minus_tiny}) == 5


indices = st.integers(0, (1 << 31) - 1)
listed = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]), indices),
    min_size=1, max_size=BLOCK - 1, unique_by=lambda pair: pair[1],
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@example([(1, (1 << 31) - 1)])
@example([(0xFFFFFFFF, (1 << 31) - 1), (0xFFFFFFFF, 0)])
@given(listed)
def test_the_largest_key_with_index_is_the_best_candidate(pairs: list[tuple[int, int]]) -> None:
    keys, indices = (torch.tensor(column, dtype=torch.int64, device=DEVICE) for column in zip(*pairs, strict=True))
    best = torch.empty(len(pairs) + 1, dtype=torch.int64, device=DEVICE)
    config = runtime.Config({"BLOCK": BLOCK})
    runtime.launch(best_kernel, (1,), best, keys, indices, best, len(pairs), config=config)
    *each, over_all = best.tolist()
    assert each == [index if key else -1 for key, index in pairs]
    key, minus_index = max((key, -index) for key, index in pairs)
    assert over_all == (-minus_index if key else -1)


# --- wrappers and launches ------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 40), st.integers(0, 8), st.integers(0, 8))
def test_power_of_two_is_the_smallest_that_covers(size: int, low: int, more: int) -> None:
    smallest, largest = 1 << low, 1 << (low + more)
    block = runtime.power_of_two(size, smallest, largest)
    assert block.bit_count() == 1
    assert smallest <= block <= largest
    assert block >= size or block == largest
    assert block == smallest or block // 2 < size


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_cdiv_rounds_up(a: int, b: int) -> None:
    assert (runtime.cdiv(a, b) - 1) * b < a <= runtime.cdiv(a, b) * b


@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0), (2, 1, 0)])
def test_an_empty_grid_is_no_launch(grid: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(runtime, "recorder", lambda *launch: launched.append(launch))
    runtime.launch(keys_kernel, grid, torch.zeros(1), config=runtime.Config({}))
    assert launched == []
    monkeypatch.setattr(runtime, "recorder", None)
    runtime.launch(keys_kernel, grid, torch.zeros(1), config=runtime.Config({}))  # which lacks every argument


def test_the_recorder_sees_launches_instead_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(runtime, "recorder", lambda *launch: launched.append(launch))
    keys_of(torch.zeros(5), torch.ones(5).bool(), True)
    ((kernel, grid, args, keywords),) = launched
    assert kernel is keys_kernel
    assert grid == (1,)
    assert [a.dtype for a in args] == [torch.float32, torch.uint8, torch.int64]
    assert keywords == {"BLOCK": BLOCK, "LARGEST": True, "num_warps": 4, "num_stages": 2}


def test_configurations_are_chosen_for_the_target_that_is_assumed() -> None:
    device = torch.device("cpu")
    without = runtime.target(device)
    with runtime.assume(runtime.Target("hip", "gfx942", 64)):
        with runtime.assume(runtime.Target("cuda", 100)):
            assert runtime.target(device) == ("cuda", 100, 32)
        assert runtime.target(device) == ("hip", "gfx942", 64)
        with pytest.raises(ZeroDivisionError), runtime.assume(runtime.Target("cuda", 90)):
            raise ZeroDivisionError
        assert runtime.target(device).arch == "gfx942"
    assert runtime.target(device) == without == ("cuda", 80, 32)


def test_only_rows_that_are_not_contiguous_are_copied() -> None:
    x = torch.arange(24.0).view(4, 6)
    for same in (x, x[:, 1:4], x[::2], x[:, :1], x.t()[:, :1]):
        assert runtime.rows(same) is same
    assert torch.equal(runtime.rows(x.t()), x.t())
    assert runtime.rows(x.t()).stride() == (4, 1)
    mask = x > 7
    assert runtime.mask_rows(None) is None
    seen = runtime.mask_rows(mask[:, 1:])
    assert seen.dtype == torch.uint8
    assert seen.data_ptr() == mask.data_ptr() + 1
    assert torch.equal(runtime.mask_rows(mask.t()), mask.t().to(torch.uint8))


@pytest.mark.parametrize("asked", [False, True])
def test_indices_are_checked_and_memory_is_poisoned_where_that_is_asked_for(asked: bool) -> None:
    script = """
import torch
from tokenprune_kernels.triton.runtime import check_indices, fresh, traced, workspace
def said(*values):
    try:
        check_indices("op", "name", torch.tensor(values, dtype=torch.int64), 3)
    except IndexError as error:
        return str(error)
def poisoned():
    made = fresh(torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2).bool(), torch.zeros(2).to("meta"))
    integers = made[1].tolist() == [0x5A5A5A5A5A5A5A5A] * 2
    return made[0].isnan().all().item(), integers, made[2].any().item(), workspace(made[0], (3,)).shape == (3,)
print([said(), said(-1, 0, 2), said(0, 3), said(-2), said(-(2**63), 2**63 - 1)])
print(*poisoned())
with traced():
    print(said(3), *poisoned())
"""
    switch = str(int(asked))
    lines = without_interpreter("-c", script, TOKENPRUNE_CHECK_INDICES=switch, TOKENPRUNE_POISON=switch).splitlines()
    what = "tokenprune::op: name must lie in [-1, 3), got"
    wrong = [f"{what} 0 to 3", f"{what} -2 to -2", f"{what} {-(2**63)} to {2**63 - 1}"]
    assert lines[0] == str([None, None, *(wrong if asked else [None] * 3)])
    assert lines[1] == f"{asked} {asked} False True"
    assert lines[2] == "None False False False True"


# --- when Triton serves ---------------------------------------------------------------------------------------------


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    _triton.absent.cache_clear()
    yield
    _triton.absent.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("2.3.1", "triton 2.3.1 is older than 3.6"),
        ("3.5.1", "triton 3.5.1 is older than 3.6"),
        ("3.6.0", None),
        ("3.6.0+git35c6c7c6", None),
        ("3.10.0", None),
        ("4.0.0", None),
        (None, None),  # a build under another name, pytorch-triton-rocm
    ],
)
def test_old_releases_are_not_used(version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version_of(name: str) -> str:
        if name == "triton" and version is not None:
            return version
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", version_of)
        assert _triton.absent() == reason
        if reason is not None:
            assert _triton.unavailable("cuda") == reason


@pytest.mark.usefixtures("_asked_anew")
def test_without_triton_the_reason_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
        assert _triton.absent() == _triton.unavailable("cuda") == "triton is not installed"


def test_first_calls_in_several_threads_define_the_ops_once() -> None:
    script = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from tokenprune_kernels import _triton

sys.setswitchinterval(1e-6)
together = threading.Barrier(4)

def first_call(_):
    together.wait()
    return _triton.namespace()

with ThreadPoolExecutor(4) as pool:
    print(len(set(map(id, pool.map(first_call, range(4))))))
"""
    assert printed("-c", script) == "1\n"


def test_devices_without_triton_are_named() -> None:
    assert _triton.unavailable("mps") == "the inputs are on mps"
    assert _triton.unavailable("cuda") is None
    assert _triton.unavailable("xpu") is None


def test_without_the_interpreter_cpu_tensors_are_refused_with_the_reason() -> None:
    script = """
import torch, tokenprune_kernels as tp
try:
    tp.score_entropy(torch.ones(1, 3), backend="triton")
except tp.BackendUnavailableError as error:
    print(error)
"""
    assert without_interpreter("-c", script).strip() == (
        "backend 'triton' was asked for, but the inputs are on cpu:"
        " the kernels need a GPU (or TRITON_INTERPRET=1 from the start, for tests)"
    )


@pytest.mark.parametrize("op", sorted(TRITON_OPS))
def test_triton_serves_intel_gpus(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenprune::{op}", "XPU")


def test_without_the_library_triton_serves_cuda_devices() -> None:
    script = """
import sys, warnings
sys.modules["tokenprune_kernels._C"] = None
warnings.simplefilter("ignore")
import torch, tokenprune_kernels
has = torch._C._dispatch_has_kernel_for_dispatch_key
from tokenprune_kernels import _triton
ops = [f"tokenprune::{name}" for name in _triton.served()]
print(len(ops), [op for op in ops if not has(op, "CUDA") or not has(op, "XPU") or has(op, "CPU")])
print("triton" in sys.modules)
"""
    assert without_interpreter("-c", script).splitlines() == [f"{len(TRITON_OPS)} []", "False"]


# --- torch.compile --------------------------------------------------------------------------------------------------

DISSOLVED = [(op, name) for op, name in SAMPLES if op in TRITON_OPS and op not in _triton._OPAQUE]

# They write where the values of an input say. From such an address torch goes back through the arguments of the helper
# that loaded the values, takes the input for written, and copies it: scores, groups or a mask, [B, N].
SCATTERING = ("select_topk", "select_grouped_topk", "select_two_tailed", "select_mixture", "mask_to_indices")


@functools.cache
def graphs() -> dict[str, dict[str, Any]]:
    """What becomes of every sample call under torch.compile on a GPU, in a process without the interpreter."""
    return json.loads(without_interpreter("-m", "testing.triton_compile.trace", json.dumps(DISSOLVED)).splitlines()[-1])


def test_every_op_has_kernels() -> None:
    assert set(kernels.__all__) == TRITON_OPS


@pytest.mark.parametrize("sizes", ["fixed", "symbolic"])
@pytest.mark.parametrize(("op", "name"), DISSOLVED, ids=[f"{op}-{name}" for op, name in DISSOLVED])
def test_torch_compile_sees_the_kernels_of_an_op(op: str, name: str, sizes: str) -> None:
    got = graphs()[f"{op} {name} {sizes}"]
    assert "error" not in got, got["error"]
    assert got["kernels"] >= 1
    assert got["opaque"] == []
    assert got["warned"] == []
    copied = [name for name in got["cloned inputs"] if op not in SCATTERING]
    assert copied == [], "an input is copied, because the kernel seems to write to it"
    assert all(got["written"]), "a kernel whose writes are not seen is removed as dead code"
    assert got["symbols"] == (3 if sizes == "symbolic" else 0)
    assert got["made constant"] == [], "code compiled for one size is compiled again for the next"
