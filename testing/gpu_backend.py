"""Backend "gpu" of the tests: CPU tensors go to the GPU, through torch.ops.tokenprune there, and back.

Storages travel whole, so that strides, gaps and unaligned starts arrive on the GPU as the test made them; afterwards
they are compared with what was sent, gaps included. With TOKENPRUNE_TEST_GPU=emulated everything stays on the CPU and
the emulated kernels run: that tests this file, not the kernels.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune_kernels import _backend

EMULATED = os.environ.get("TOKENPRUNE_TEST_GPU") == "emulated"
DEVICE = "cpu" if EMULATED else "cuda"
KEY = "CPU" if EMULATED else "CUDA"
LARGEST = 1 << 30  # bytes of a storage
NAMESPACE = "tokenprune_emulated" if EMULATED else "tokenprune"


def has_gpu() -> bool:
    return not EMULATED and os.environ.get("TOKENPRUNE_TEST_GPU") != "0" and torch.cuda.is_available()


def absent() -> str | None:
    """Why there is no such backend here, or None."""
    wish = os.environ.get("TOKENPRUNE_TEST_GPU")
    if wish == "0":
        return "TOKENPRUNE_TEST_GPU=0"
    if EMULATED:
        try:
            import emulator

            emulator.ops()
        except Exception as error:
            return f"no emulator: {error}"
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _backend.unavailable("cuda", "cuda")


def has_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", KEY)


def kernel(op: str, namespace: str = NAMESPACE) -> Any:
    """The op, which must have a kernel: without one torch would run the reference, and the test would show nothing."""
    if namespace == NAMESPACE and not has_kernel(op):
        pytest.skip(f"no CUDA kernel of {op} in this build")
    return getattr(getattr(torch.ops, namespace), op)


def _travels_whole(t: Tensor) -> bool:
    """Gradients, torch.func's wrappers and lazy conjugates need operations that know them."""
    return (
        t.device.type == "cpu"
        and t.layout == torch.strided
        and not (t.is_conj() or t.is_neg())
        and not (t.requires_grad and torch.is_grad_enabled())
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and torch.autograd.forward_ad.unpack_dual(t).tangent is None
    )


class Trip:
    """The storages of one call that went to the GPU."""

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, Tensor]] = []

    def there(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self.there(v) for v in value] if isinstance(value, list) else tuple(self.there(v) for v in value)
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        if not _travels_whole(value):
            return value.to(DEVICE)
        if value.untyped_storage().nbytes() > LARGEST:
            pytest.skip("the storage is too large to travel; tests/cuda/test_gpu.py makes its own on the GPU")
        with torch.no_grad():
            here = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            sent = here.clone() if EMULATED else here.to(DEVICE)
            self._sent.append((here, sent))
            moved = torch.empty(0, dtype=value.dtype, device=sent.device)
            return moved.set_(sent.untyped_storage(), value.storage_offset(), value.size(), value.stride())

    def assert_nothing_was_written(self, op: str) -> None:
        for here, sent in self._sent:
            assert torch.equal(sent.cpu(), here), f"{op} wrote to the memory of an input"


def carried(value: Any) -> Any:
    """Tensors on the device, by an operation that torch knows."""
    if isinstance(value, (list, tuple)):
        return [carried(v) for v in value] if isinstance(value, list) else tuple(carried(v) for v in value)
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def back(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [back(v) for v in value] if isinstance(value, list) else tuple(back(v) for v in value)
    return value.cpu() if isinstance(value, Tensor) else value


class OnGpu:
    """The namespace that the package's Python functions call into; the ops of `namespace` serve it."""

    def __init__(self, namespace: str = NAMESPACE) -> None:
        self._namespace = namespace

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)

        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # only what can be traced
                plain = getattr(getattr(torch.ops, self._namespace), op)
                return back(plain(*carried(args), **{name: carried(value) for name, value in kwargs.items()}))
            function, trip = kernel(op, self._namespace), Trip()
            moved = {name: trip.there(value) for name, value in kwargs.items()}
            result = back(function(*trip.there(args), **moved))
            trip.assert_nothing_was_written(op)
            return result

        return run
