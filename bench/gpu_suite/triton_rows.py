"""The Triton kernels on the rows of the timing table: right or not, the same picks as the CUDA kernels, how fast.

The first call of a row compiles its kernels. The stage `triton` starts with an empty cache on disk and measures that;
the stage `triton_warm`, a new process on the same cache, measures what a second start of a program pays.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from . import checks
from .checks import relative_error
from .device import Device, flat
from .rows import Row, all_rows
from .samples import require
from .timing import described, guarded, input_sets, measure, ratios, seconds_of
from .work import Item

REPEATS, DRY_REPEATS = 10, 2


def timed_call(device: Device, f: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its milliseconds until the device is done."""
    device.synchronize()
    began = time.perf_counter()
    result = f()
    device.synchronize()
    return result, round((time.perf_counter() - began) * 1e3, 3)


def agreement(got: Any, other: Any) -> Item:
    """How far two backends agree: the share of equal integers, and the largest relative error of the floats."""
    pairs = list(zip(flat(got), flat(other), strict=True))
    whole = [(a, b) for a, b in pairs if not a.is_floating_point()]
    compared = sum(a.numel() for a, _ in whole)
    equal = sum(int((a == b).sum()) for a, b in whole)
    errors = [relative_error(a, b) for a, b in pairs if a.is_floating_point()]
    return {
        "equal_integers": equal / compared if compared else None,
        "relative_error": max(errors) if errors else None,
    }


def promises(device: Device, row: Row, inputs: checks.Inputs, repeats: int) -> None:
    others = row.make(device.torch_device, 1)
    checks.inputs_unchanged(device, row.ours, inputs)
    checks.determinism(device, row.ours, inputs, repeats)
    checks.no_waiting(device, row.ours, inputs)
    checks.streams(device, row.ours, inputs, others)
    checks.graph(device, row.ours, inputs, others)


def compare(device: Device, row: Row, twin: Row, repeats: int, seconds: float) -> Item:
    """`row` runs the CUDA kernels and `twin` the Triton kernels on the same inputs."""
    found: Item = {"row": described(row), **require(device.using("triton"), *row.ops)}
    with torch.inference_mode():
        inputs = twin.make(device.torch_device, 0)
        result, found["first_call_ms"] = timed_call(device, lambda: twin.ours(inputs))
        _, found["second_call_ms"] = timed_call(device, lambda: twin.ours(inputs))
        found["check"] = twin.check(device, inputs, result)
        promises(device, twin, inputs, repeats)
        sets = input_sets(device, row, inputs)
        found["times"] = {"ours": measure(device, twin.ours, sets, seconds, capture=True)}
        if all(device.has_kernel(op) for op in row.ops):
            found["agreement"] = agreement(result, row.ours(inputs))
            found["times"]["cuda"] = measure(device, row.ours, sets, seconds, capture=True)
        found["launches"] = guarded(lambda: device.using("triton").launches(lambda: twin.ours(inputs)))
    found["ratios"] = ratios(found["times"])
    return found


# Of a dry run: interpreted kernels take seconds, and products of bfloat16 matrices are wrong there (testing/cases.py).
DRY_OPS = ("attention_entropy", "select_topk", "score_entropy")


def pairs(device: Device, toy: bool) -> list[tuple[Row, Row]]:
    """Each row twice: with the CUDA kernels and with the Triton kernels."""
    both = list(zip(all_rows(device, toy), all_rows(device.using("triton"), toy), strict=True))
    if device.real:
        return both
    chosen = {row.ops: (row, twin) for row, twin in both if row.dtype != torch.bfloat16 and set(row.ops) <= {*DRY_OPS}}
    return list(chosen.values())


def items(device: Device, toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    repeats = DRY_REPEATS if toy else REPEATS
    seconds = seconds_of(toy, quick)
    return {
        row.name: lambda row=row, twin=twin: compare(device, row, twin, repeats, seconds)
        for row, twin in pairs(device, toy)
    }


def warm_items(device: Device, toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """The first call of every row in this process, with what the stage before left on disk."""

    def run(twin: Row) -> Item:
        found = require(device.using("triton"), *twin.ops)
        with torch.inference_mode():
            inputs = twin.make(device.torch_device, 0)
            _, first = timed_call(device, lambda: twin.ours(inputs))
            _, second = timed_call(device, lambda: twin.ours(inputs))
        return {**found, "first_call_ms": first, "second_call_ms": second}

    return {twin.name: lambda twin=twin: run(twin) for _, twin in pairs(device, toy)}
