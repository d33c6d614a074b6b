"""What every test file shares: the backends that run here, the dtypes, and the tolerance rule."""

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from testing import gpu_backend
from testing.process import printed
from tokenprune_kernels import _backend, _triton
from tokenprune_kernels._triton import interpreted as interpreting

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPE_IDS = tuple(str(d).removeprefix("torch.") for d in DTYPES)


# TOKENPRUNE_TEST_BACKENDS=gpu: only these, for runs that are about one of them.
WANTED = tuple(filter(None, os.environ.get("TOKENPRUNE_TEST_BACKENDS", "cpu,reference,emulator,triton,gpu").split(",")))


def add_emulator() -> str | None:
    """Make the CUDA kernels a backend named "emulator", which takes CPU tensors; else the reason why not."""
    if "emulator" not in WANTED:
        return "not in TOKENPRUNE_TEST_BACKENDS"
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        return "no C++ compiler"
    if tp.config()["backends"]["cpu"] is not None:
        return "the compiled library is not loaded"
    import emulator

    _backend._extra["emulator"] = emulator.ops(), "cuda"
    return None


def add_gpu() -> str | None:
    """Make the CUDA kernels on a real GPU a backend named "gpu", which takes CPU tensors; else the reason why not."""
    reason = gpu_backend.absent() if "gpu" in WANTED else "not in TOKENPRUNE_TEST_BACKENDS"
    if reason is None:
        _backend._extra["gpu"] = gpu_backend.OnGpu(), "cuda"
    return reason


def add_triton() -> str | None:
    """Make the Triton kernels a backend "triton" that takes CPU tensors, interpreted without a GPU; else why not."""
    if "triton" not in WANTED:
        return "not in TOKENPRUNE_TEST_BACKENDS"
    if _triton.absent() is not None:
        return _triton.absent()
    if gpu_backend.has_gpu():
        _backend._extra["triton"] = gpu_backend.OnGpu("tokenprune_triton"), "triton"
        _triton.namespace()
    else:
        if "triton.language" in sys.modules and not interpreting():
            raise ImportError("testing.cases has to be imported before Triton, whose interpreter it turns on")
        os.environ["TRITON_INTERPRET"] = "1"
        prepare_interpreter()
    return None


def prepare_interpreter() -> None:
    """Calls of device functions in Triton's interpreter without its search of the language module each time.

    The launch has patched the module already; what a module of device functions needs beside it, once is enough for.
    The search takes about a millisecond, most of a test's time.
    """
    from triton.runtime import interpreter

    done = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in done:
            done.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


NO_EMULATOR = add_emulator()
NO_TRITON = add_triton()
NO_GPU = add_gpu()
BACKENDS = (
    *(name for name in ("cpu", "reference") if name in WANTED and tp.config()["backends"][name] is None),
    *(() if NO_EMULATOR else ("emulator",)),
    *(() if NO_TRITON else ("triton",)),
    *(() if NO_GPU else ("gpu",)),
)


def lacks(backend: str, op: str) -> str | None:
    """Why a backend of the tests does not run an op, or None: its kernels of that op are not written yet."""
    return None if backend == "reference" else _backend.lacks(backend, op)


def backends_of(op: str) -> tuple[str, ...]:
    return tuple(backend for backend in BACKENDS if lacks(backend, op) is None)


def interpreted(backend: str) -> bool:
    """Is it Triton's interpreter, which takes a thousand times as long as a compiled kernel?"""
    return backend == "triton" and not gpu_backend.has_gpu()


GPU_BACKENDS = ("emulator", "triton", "gpu")  # float64 is for the CPU and the references


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """The floating dtypes that a backend takes.

    In Triton's interpreter a product of bfloat16 matrices is wrong by many orders of magnitude (triton issue 11584, and
    still in 3.9): bfloat16 is for the GPU there.
    """
    if interpreted(backend):
        return (torch.float16, torch.float32)
    return DTYPES[:3] if backend in GPU_BACKENDS else DTYPES


over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
over_backends = pytest.mark.parametrize("backend", BACKENDS)
compiled = pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled library is not loaded")
over_capabilities = pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])


def run_python(backend: str, op: str, *args: Any, **kwargs: Any) -> Any:
    """The Python function of an op on a backend of the package."""
    return getattr(tp, op)(*args, backend=backend, **kwargs)


# How a test calls an op on a backend: runner(op, *args, **kwargs).
RUNNERS: dict[str, Callable[..., Any]] = {
    name: partial(run_python, name) for name in ("cpu", "reference", "emulator", "triton", "gpu")
}


def assert_as_good_as_torch(got: Tensor, exact: Tensor, plain: Tensor, scale: float = 1.0) -> None:
    """`got` errs at most twice as much as plain PyTorch in the input dtype does, plus a floor of a few roundings.

    exact: the reference in float64. plain: the reference run on the inputs as they are. The floor is 16 units in the
    last place of `scale` in the output dtype, for results where plain PyTorch happens to be exact.
    """
    assert got.dtype == plain.dtype
    assert got.shape == exact.shape
    finite = exact.isfinite()
    torch.testing.assert_close(got[~finite].double(), exact[~finite].double(), equal_nan=True, rtol=0, atol=0)
    error = (got.double() - exact)[finite].abs().max() if finite.any() else torch.zeros(())
    allowed = (plain.double() - exact)[finite].abs().max() if finite.any() else torch.zeros(())
    floor = 16 * torch.finfo(got.dtype).eps * scale
    assert error <= 2 * allowed + floor, f"error {error:.3e}, plain PyTorch {allowed:.3e}, floor {floor:.3e}"


def run_with_capability(capability: str, script: str) -> list[str]:
    """The lines a Python script prints in a process of its own whose CPU kernels use this instruction set."""
    say = "from tokenprune_kernels import _registry\nprint(_registry.build_info()['cpu_capability'])\n"
    told = printed("-c", say + script, TOKENPRUNE_CPU_CAPABILITY=capability, OMP_NUM_THREADS="1")
    chosen, *lines = told.splitlines()
    if chosen != capability:
        pytest.skip(f"this machine has {chosen}, not {capability}")
    return lines
