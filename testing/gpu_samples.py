"""The sample calls of every op on the device, against the reference in float64: without pytest, and quick.

The values of the samples are exactly representable (testing/op_inputs.py), so that indices must be equal and floats
may differ by a few roundings only.
"""

from collections.abc import Callable
from typing import Any

import torch

from testing import op_samples
from testing.gpu_checks import Inputs, bits, close
from testing.gpu_device import Device, MissingError, flat
from testing.op_samples import Call, Sizes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = 1e-5


def require(device: Device, *ops: str) -> dict[str, Any]:
    """Every op must have a kernel; the CPU twin goes on with another backend, and says so."""
    absent = [op for op in ops if not device.has_kernel(op)]
    if absent and device.real:
        kind = "Triton" if device.forced == "triton" else "CUDA"
        raise MissingError(f"no {kind} kernel of {', '.join(absent)} in this build")
    return {"stand_in": absent} if absent else {}


def on_device(call: Call, device: Device) -> Call:
    return op_samples.map_tensors(call, lambda _, t: t.to(device.torch_device))


def function(device: Device, call: Call) -> Callable[[Inputs], Any]:
    """The call's op as a function of its inputs."""
    op = device.op(call.op)

    def run(inputs: Inputs) -> Any:
        args, kwargs = op_samples.positional(Call(call.op, inputs))
        return op(*args, **kwargs)

    return run


def run_sample(device: Device, op: str, name: str, dtype: torch.dtype, sizes: Sizes | None = None) -> dict[str, Any]:
    found = require(device, op)
    call = op_samples.make(op, name, sizes, dtype)
    got = [t.cpu() for t in flat(function(device, call)(on_device(call, device).arguments))]
    if op == "gather_compact":  # it copies: every bit is the reference's, in the same dtype
        want = op_samples.outputs(_reference(call))
        for g, w in zip(got, want, strict=True):
            assert torch.equal(bits(g), bits(w)), "gather_compact changed a bit"
        return found
    exact = op_samples.map_tensors(call, lambda _, t: t.double() if t.is_floating_point() else t)
    return {**found, **close(got, _reference(exact), TOLERANCE)}


def _reference(call: Call) -> Any:
    from tokenprune_kernels import reference

    args, kwargs = op_samples.positional(call)
    return getattr(reference, call.op)(*args, **kwargs)


def first_contact(device: Device) -> dict[str, Callable[[], dict[str, Any]]]:
    """One call of every op: what is ported, and does it run at all?"""
    return {op: lambda op=op: run_sample(device, op, "plain", torch.float32) for op in op_samples.OPS}


def all_samples(device: Device) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        f"{op}-{name}-{str(dtype).removeprefix('torch.')}": lambda op=op, name=name, dtype=dtype: run_sample(
            device, op, name, dtype
        )
        for op, name in op_samples.SAMPLES
        for dtype in DTYPES
    }
