"""What only a GPU can show: streams, graphs, waiting, other devices, offsets beyond 32 bits, device memory running out.

Skipped without a GPU. With TOKENPRUNE_TEST_GPU=emulated the tests run on CPU tensors and the emulated kernels, which
tests them and not the kernels: `python -m bench.gpu_suite --dry-run` does so.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from testing import ROOT, gpu_backend
from testing import gpu_checks as checks
from testing import op_samples as samples
from testing.cases import NO_GPU
from testing.gpu_device import Device, flat, pick
from testing.gpu_samples import function, on_device
from testing.op_samples import OPS, SAMPLE_IDS, SAMPLES, SELECTING, Sizes, make, map_tensors, positional

pytestmark = pytest.mark.skipif(NO_GPU is not None, reason=f"no GPU: {NO_GPU}")
REAL = not gpu_backend.EMULATED
real = pytest.mark.skipif(not REAL, reason="only a GPU can show it")
over_samples = pytest.mark.parametrize(("op", "name"), SAMPLES, ids=SAMPLE_IDS)
over_ops = pytest.mark.parametrize("op", OPS)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
INDEXED = tuple((op, n) for op, n in SAMPLES if samples.INDEX_INPUTS & set(make(op, n).arguments))


@pytest.fixture(scope="module")
def device() -> Device:
    return pick()


@pytest.fixture
def sample(device: Device) -> Callable[..., tuple[Any, checks.Inputs]]:
    """sample(op, name) -> the op as a function of its inputs, and inputs on the device."""

    def prepare(op: str, name: str, sizes: Sizes | None = None, dtype: torch.dtype = torch.float32) -> Any:
        gpu_backend.kernel(op)  # skips when it is not ported
        call = on_device(make(op, name, sizes, dtype), device)
        return function(device, call), call.arguments

    return prepare


@over_samples
def test_fifty_calls_are_bitwise_equal(op: str, name: str, device: Device, sample: Any) -> None:
    f, inputs = sample(op, name, Sizes(tokens=150, rows=9, k=20))
    checks.determinism(device, f, inputs, 50 if REAL else 3)


@over_samples
def test_inputs_are_not_written(op: str, name: str, device: Device, sample: Any) -> None:
    checks.inputs_unchanged(device, *sample(op, name))


@over_samples
def test_work_goes_to_the_current_stream(op: str, name: str, device: Device, sample: Any) -> None:
    f, inputs = sample(op, name)
    checks.streams(device, f, inputs, checks.changed(inputs))


@over_samples
@over_dtypes
def test_a_captured_graph_follows_its_inputs(
    op: str, name: str, dtype: torch.dtype, device: Device, sample: Any
) -> None:
    f, inputs = sample(op, name, None, dtype)
    checks.graph(device, f, inputs, checks.changed(inputs))


@over_samples
def test_the_host_never_waits(op: str, name: str, device: Device, sample: Any) -> None:
    checks.no_waiting(device, *sample(op, name))


@over_samples
def test_two_threads_do_not_disturb_each_other(op: str, name: str, device: Device, sample: Any) -> None:
    f, inputs = sample(op, name)
    checks.two_threads(device, f, inputs, checks.changed(inputs))


@real
@over_ops
def test_tensors_of_a_device_that_is_not_current(op: str, device: Device) -> None:
    gpu_backend.kernel(op)
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    call = make(op)
    want = flat(function(device, call)(map_tensors(call, lambda _, t: t.to("cuda:0")).arguments))
    elsewhere = map_tensors(call, lambda _, t: t.to("cuda:1"))
    with torch.cuda.device(0):
        got = flat(function(device, call)(elsewhere.arguments))
        assert torch.cuda.current_device() == 0
    assert all(g.device.index == 1 for g in got)
    checks.assert_same_bits([g.cpu() for g in got], [w.cpu() for w in want], "on cuda:1")


@over_samples
def test_opcheck(op: str, name: str, device: Device) -> None:
    gpu_backend.kernel(op)
    args, kwargs = positional(on_device(make(op, name, Sizes(tokens=11, channels=8, k=4)), device))
    overload = getattr(torch.ops.tokenprune, op).default
    assert set(torch.library.opcheck(overload, args, kwargs).values()) == {"SUCCESS"}


@over_ops
def test_compiled_functions_call_the_same_kernel(op: str, device: Device) -> None:
    gpu_backend.kernel(op)
    args, kwargs = positional(on_device(make(op), device))

    def run(*a: Any, **k: Any) -> Any:
        return getattr(torch.ops.tokenprune, op)(*a, **k)

    torch._dynamo.reset()  # all ops share `run`, and dynamo compiles one function a few times only
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    checks.assert_same_bits(flat(compiled(*args, **kwargs)), flat(run(*args, **kwargs)), "compiled")


@real
def test_inductor_keeps_the_op(device: Device) -> None:
    gpu_backend.kernel("select_topk")
    scores = torch.rand(3, 100, device=device.torch_device)
    compiled = torch.compile(lambda s: tp.select_topk(s * 2, 7)[0] + 1, fullgraph=True)
    assert torch.equal(compiled(scores), tp.select_topk(scores * 2, 7)[0] + 1)


def test_tensors_choose_the_kernel(device: Device) -> None:
    """Without backend=, tensors on the GPU go to the CUDA kernels."""
    gpu_backend.kernel("score_entropy")
    scores = torch.rand(2, 50)
    got = tp.score_entropy(scores.to(device.torch_device))
    assert got.device.type == device.torch_device.type
    torch.testing.assert_close(got.cpu(), tp.reference.score_entropy(scores))


def test_gradient_of_gather_compact(device: Device) -> None:
    gpu_backend.kernel("gather_compact")
    hidden, index = torch.randn(2, 9, 5), torch.tensor([[0, 4, -1], [2, 3, 8]])
    here, there = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    tp.gather_compact([here], index, dims=[1], backend="reference")[0].square().sum().backward()
    tp.gather_compact([there], index, dims=[1], backend="gpu")[0].square().sum().backward()
    torch.testing.assert_close(there.grad, here.grad)


@pytest.mark.parametrize(("op", "name"), INDEXED, ids=lambda value: str(value))
def test_bad_indices_count_as_no_entry(op: str, name: str, device: Device, sample: Any) -> None:
    """Far outside as well as just outside: no memory there is touched (compute-sanitizer watches the same call)."""
    f, inputs = sample(op, name)
    listed = samples.INDEX_INPUTS & set(inputs)
    for bad in (37, 2**31, 2**40, -2, -(2**40), 2**63 - 1, -(2**63)):
        wrong, none = dict(inputs), dict(inputs)
        for argument in listed:
            indices = inputs[argument].clone()
            indices[:, 0] = bad
            wrong[argument] = indices
            none[argument] = indices.masked_fill(indices == bad, -1)
        checks.assert_same_bits(flat(f(wrong)), flat(f(none)), f"index {bad}")


CHECKED = """
import sys
import bench.gpu_suite
from testing import op_samples
from testing.gpu_device import pick
from testing.gpu_samples import function, on_device
device = pick()
for word in sys.argv[1:]:
    op, name = word.split("-")
    call = on_device(op_samples.make(op, name), device)
    run, inputs = function(device, call), call.arguments
    run(inputs)
    for argument in op_samples.INDEX_INPUTS & set(inputs):
        wrong = inputs[argument].clone()
        wrong[1, -1] = 37
        try:
            run({**inputs, argument: wrong})
        except IndexError as error:
            print(word, argument, "37" in str(error))
"""


def test_indices_are_checked_when_asked_for() -> None:
    """TOKENPRUNE_CHECK_INDICES=1 is read once, so that it needs a process of its own."""
    ported = [(op, name) for op, name in INDEXED if gpu_backend.has_kernel(op)]
    if not ported:
        pytest.skip("no CUDA kernel of an op with indices in this build")
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, *(f"{op}-{name}" for op, name in ported)], cwd=ROOT,
        env={**os.environ, "TOKENPRUNE_CHECK_INDICES": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    want = [
        f"{op}-{name} {argument} True"
        for op, name in ported
        for argument in samples.INDEX_INPUTS & set(make(op, name).arguments)
    ]
    assert sorted(done.stdout.splitlines()) == sorted(want), done.stderr[-2000:]


def _spread(t: Tensor, from_front: int, span: int) -> tuple[list[int], int]:
    """Strides that put one dimension over `span` elements and keep the last one dense, and the elements this takes."""
    dim, inner = min(from_front, t.dim() - 2), 1
    strides = [0] * t.dim()
    for d in reversed(range(t.dim())):
        if d != dim:
            strides[d], inner = inner, inner * t.shape[d]
    strides[dim] = max(-(-span // max(t.shape[dim] - 1, 1)), inner)
    return strides, (t.shape[dim] - 1) * strides[dim] + inner


@over_samples
@pytest.mark.parametrize("from_front", [0, 1], ids=["first", "second"])
def test_offsets_beyond_32_bits(op: str, name: str, from_front: int, device: Device) -> None:
    """More than 2^31 elements lie between the first and the last element of every tensor."""
    gpu_backend.kernel(op)
    span = 2**31 + 4096 if REAL else 5000
    call = on_device(make(op, name, dtype=torch.bfloat16), device)
    wide = [t for _, t, _ in samples.tensors(call) if t.dim() > 1]
    needed = sum(_spread(t, from_front, span)[1] * t.element_size() for t in wide)
    if device.free_bytes() < needed + (24 << 30) and REAL:
        pytest.skip(f"{needed >> 30} GiB of device memory are not free")

    def spread(_: str, t: Tensor) -> Tensor:
        if t.dim() < 2:
            return t
        strides, size = _spread(t, from_front, span)
        return torch.empty(size, dtype=t.dtype, device=t.device).as_strided(t.shape, strides).copy_(t)

    f = function(device, call)
    far = map_tensors(call, spread)
    checks.assert_same_bits(flat(f(far.arguments)), flat(f(call.arguments)), "with large strides")


@real
def test_gather_of_more_than_2_31_elements(device: Device) -> None:
    gpu_backend.kernel("gather_compact")
    tokens, width = 40_000, 60_000
    if device.free_bytes() < 4 * tokens * width:
        pytest.skip("10 GB of device memory are not free")
    hidden = torch.randint(0, 100, (1, tokens, width), dtype=torch.int8, device=device.torch_device)
    index = torch.randperm(tokens, device=device.torch_device).sort().values.unsqueeze(0)
    index[0, 5] = -1
    (kept,) = tp.gather_compact([hidden], index, dims=[1], backend="cuda")
    hidden[0, 5] = 0
    assert torch.equal(kept, hidden)


@real
@pytest.mark.parametrize("op", SELECTING)
def test_memory_that_runs_out_raises_and_the_next_call_works(op: str, device: Device, sample: Any) -> None:
    f, inputs = sample(op, "plain")
    want = flat(f(inputs))
    with pytest.raises(RuntimeError):
        f({**inputs, "capacity" if op == "mask_to_indices" else "k": 2**40})
    checks.assert_same_bits(flat(f(inputs)), want, "after an error")


@real
def test_devices_do_not_mix(device: Device) -> None:
    gpu_backend.kernel("score_entropy")
    scores = torch.rand(2, 5, device=device.torch_device)
    with pytest.raises((ValueError, RuntimeError), match="mask"):
        tp.score_entropy(scores, mask=torch.ones(2, 5, dtype=torch.bool))


@real
def test_outputs_are_poisoned_on_the_device_too(device: Device) -> None:
    """tests/conftest.py sets TOKENPRUNE_POISON=1: every fresh output is filled before the kernel writes to it."""
    gpu_backend.kernel("score_entropy")
    scores = torch.rand(2, 5, device=device.torch_device)
    made = device.launches(lambda: tp.score_entropy(scores, backend="cuda"))
    assert made["kernels"] == 1
    assert made["copies_and_fills"] == 1
