"""Kernels with a fault each, so that the checks are seen to fail."""

import torch
import triton
import triton.language as tl

from tokenprune_kernels.triton.runtime import Config, launch

from .record import Recorder, Specialisation
from .shapes import meta


@triton.jit
def too_much_shared_kernel(x_ptr, BLOCK: tl.constexpr):  # noqa: N803
    lane = tl.arange(0, BLOCK)
    tl.store(x_ptr + lane, tl.gather(tl.load(x_ptr + lane), (7 * lane) % BLOCK, 0))


@triton.jit
def spilling_kernel(x_ptr, BLOCK: tl.constexpr):  # noqa: N803
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    tl.store(x_ptr + lane, x / tl.sum(x, 0))


@triton.jit
def drifting_kernel(x_ptr, channels, BLOCK: tl.constexpr):  # noqa: N803
    """Triton makes the sum the accumulator of the product: all channels are added by the matrix unit."""
    i = tl.arange(0, BLOCK)
    dots = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        x = tl.load(x_ptr + i[:, None] * channels + start + i[None, :])
        dots += tl.dot(x, tl.trans(x))
    tl.store(x_ptr + i[:, None] * BLOCK + i[None, :], dots.to(tl.float16))


@triton.jit
def refused_kernel(x_ptr):
    tl.static_assert(False, "this kernel is not for compiling")


def record(target: str) -> list[Specialisation]:
    recorder = Recorder()
    x, half = meta(1 << 16, dtype=torch.float32), meta(1 << 16)
    recorder.label = "bad"
    few_registers = {"waves_per_eu": 8} if target == "gfx942" else {}  # of the 512 that a thread may have there
    with recorder.on(target):
        launch(too_much_shared_kernel, (1,), x, x, config=Config({"BLOCK": 1 << 16}, num_warps=16))
        launch(spilling_kernel, (1,), x, x, config=Config({"BLOCK": 1 << 13}, num_warps=1), **few_registers)
        launch(drifting_kernel, (1,), half, half, 1024, config=Config({"BLOCK": 64}))
        launch(refused_kernel, (1,), x, x, config=Config({}))
    return list(recorder.found.values())
