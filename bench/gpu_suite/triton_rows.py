"""The Triton kernels on the rows of the timing table: right or not, the same picks as the CUDA kernels, how fast.

The first call of a row compiles its kernels. The stage `triton` starts with an empty cache on disk and measures that;
the stage `triton_warm`, a new process on the same cache, measures what a second start of a program pays.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu_timer import seconds_of
from bench.rows import Row
from testing import gpu_checks
from testing.gpu_device import Device
from testing.gpu_samples import require

from .timing import DRY_REPEATS, time_in_turn
from .work import Item

REPEATS = 10
# Of a dry run: interpreted kernels take seconds, and products of bfloat16 matrices are wrong there (testing/cases.py).
DRY_OPS = ("attention_entropy", "select_topk", "score_entropy")


def timed_call(device: Device, f: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its milliseconds until the device is done."""
    device.synchronize()
    began = time.perf_counter()
    result = f()
    device.synchronize()
    return result, round((time.perf_counter() - began) * 1e3, 3)


def first_calls(triton: Device, row: Row) -> tuple[Any, Item]:
    """The result, and the milliseconds of the first and the second call in this process."""
    inputs, ours = row.make(triton.torch_device, 0), triton.serve(row.ours, *row.ops)
    _, first = timed_call(triton, lambda: ours(inputs))
    result, second = timed_call(triton, lambda: ours(inputs))
    return result, {"first_call_ms": first, "second_call_ms": second}


def compare(device: Device, row: Row, repeats: int, seconds: float) -> Item:
    """The same calls by the Triton kernels and by the CUDA kernels."""
    triton = device.using("triton")
    require(triton, *row.ops)
    ours, cuda = triton.serve(row.ours, *row.ops), device.serve(row.ours, *row.ops)
    ported = all(device.has_kernel(op) for op in row.ops)
    with torch.inference_mode():
        result, calls = first_calls(triton, row)
        inputs, others = (row.make(device.torch_device, seed) for seed in (0, 1))
        # Triton's interpreter knows one thread.
        gpu_checks.promises(device, ours, inputs, others, repeats, threads=device.real)
        found = {**time_in_turn(triton, row, {"cuda": cuda} if ported else {}, seconds), **calls}
        if ported:
            found["agreement"] = gpu_checks.agreement(result, cuda(inputs))
    return found


def chosen(device: Device, rows: list[Row]) -> list[Row]:
    if device.real:
        return rows
    return list({row.ops: row for row in rows if row.dtype != torch.bfloat16 and set(row.ops) <= {*DRY_OPS}}.values())


def items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    repeats, seconds = DRY_REPEATS if toy else REPEATS, seconds_of(toy, quick)
    return {row.name: lambda row=row: compare(device, row, repeats, seconds) for row in chosen(device, rows)}


def warm_items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """The first call of every row in this process, with what the stage before left on disk."""

    def run(row: Row) -> Item:
        triton = device.using("triton")
        require(triton, *row.ops)
        with torch.inference_mode():
            return first_calls(triton, row)[1]

    return {row.name: lambda row=row: run(row) for row in chosen(device, rows)}
