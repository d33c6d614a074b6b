"""What the Triton wrappers share: fresh outputs, launches on the inputs' device and stream, the target, checks."""

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, through numpy
_POISON = os.environ.get("TOKENPRUNE_POISON") == "1"
_CHECK_INDICES = os.environ.get("TOKENPRUNE_CHECK_INDICES") == "1"


class Target(NamedTuple):
    """The GPU that code is compiled for: "cuda" with 80, 90, .. or "hip" with "gfx942", .. or "xpu"."""

    backend: str
    arch: int | str
    warp_size: int = 32


class Config(NamedTuple):
    """How one kernel is launched: its block sizes (tl.constexpr arguments), warps and pipeline stages."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


class _Tracing(threading.local):
    active = False


_tracing = _Tracing()
# Sees every launch instead of the GPU: the ahead-of-time compilation of the tests.
recorder: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] | None = None


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Inside, launches become nodes of the graph that torch.compile makes."""
    before, _tracing.active = _tracing.active, True
    try:
        yield
    finally:
        _tracing.active = before


@functools.cache
def _gpu(device: torch.device) -> Target:
    if device.type == "xpu":
        return Target("xpu", "xpu", 16)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return Target("cuda", 10 * properties.major + properties.minor)


_assumed: Target | None = None


def target(device: torch.device) -> Target:
    """What a launch on `device` is compiled for; on the CPU (interpreter, ahead-of-time compilation) it is assumed."""
    if _assumed is not None:
        return _assumed
    if device.type not in ("cuda", "xpu") or not getattr(torch, device.type).is_available():
        return Target("cuda", 80)
    return _gpu(device)


@contextlib.contextmanager
def assume(wanted: Target) -> Iterator[None]:
    """Configurations are chosen for this target inside: for tests and ahead-of-time compilation."""
    global _assumed
    before, _assumed = _assumed, wanted
    try:
        yield
    finally:
        _assumed = before


def fresh(*tensors: Tensor) -> Any:
    """Newly allocated tensors, poisoned when TOKENPRUNE_POISON=1 asks for it: an unwritten element shows up."""
    if _POISON and not _tracing.active:
        for t in tensors:
            if t.dtype == torch.bool or t.is_meta:
                continue
            # What the compiled library fills with, by bytes because torch fills few dtypes. All ones is a NaN.
            t.view(torch.uint8).fill_(0xFF if t.is_floating_point() or t.is_complex() else 0x5A)
    return tensors if len(tensors) > 1 else tensors[0]


def workspace(like: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory from torch's allocator for what one launch leaves to the next, poisoned as outputs are."""
    made: Tensor = fresh(like.new_empty(tuple(shape), dtype=dtype))
    return made


@overload
def rows(t: Tensor) -> Tensor: ...


@overload
def rows(t: None) -> None: ...


def rows(t: Tensor | None) -> Tensor | None:
    """`t`, copied only when its last dimension is not contiguous: kernels take every other stride as it is."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def batch_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def mask_rows(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes it is stored in, with contiguous rows; None stays None."""
    return None if mask is None else rows(mask.view(torch.uint8))


def check_not_float64(op: str, **tensors: Tensor | None) -> None:
    """The kernels compute in float32: float64 inputs are refused, not rounded."""
    for name, t in tensors.items():
        if t is not None and t.dtype == torch.float64:
            raise TypeError(
                f"tokenprune::{op}: {name} must be float16, bfloat16 or float32 on a GPU"
                " (backend reference takes float64), got float64"
            )


def check_indices(op: str, name: str, indices: Tensor, size: int) -> None:
    """With TOKENPRUNE_CHECK_INDICES=1, wait for the device and raise for a value outside [-1, size)."""
    if _CHECK_INDICES and not _tracing.active and indices.numel():
        low, high = (int(v) for v in indices.aminmax())
        if low < -1 or high >= size:
            raise IndexError(f"tokenprune::{op}: {name} must lie in [-1, {size}), got {low} to {high}")


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two >= size within [low, high].

    By comparisons, so that a symbolic size of torch.compile is bounded by a guard and not made constant.
    """
    block = low
    while block < high and block < size:
        block *= 2
    return block


def float32(value: float) -> float:
    """The nearest float32; infinite beyond its range, where a kernel's argument must not be left to the launcher."""
    return ctypes.c_float(float(value)).value


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, config: Config, **constants: Any) -> None:
    """Run `kernel` over `grid` on the device and current stream of `like`; an empty grid is no launch.

    args: the kernel's run-time arguments in order. constants: its other tl.constexpr arguments by name.
    """
    if any(size == 0 for size in grid):
        return
    keywords = {**config.blocks, **constants, "num_warps": config.num_warps, "num_stages": config.num_stages}
    if recorder is not None:
        recorder(kernel, grid, args, keywords)
    elif INTERPRETED:
        kernel[grid](*args, **keywords)
    elif _tracing.active:
        torch.library.wrap_triton(kernel)[grid](*args, **keywords)
    else:
        if target(like.device).backend in ("cuda", "hip"):
            keywords["enable_fp_fusion"] = True  # Triton 3.10 changes the default, and with it results in the last bit
        # Triton launches on the current stream of the current device, whichever device the tensors are on.
        with torch.get_device_module(like.device).device(like.device):
            kernel[grid](*args, **keywords)
