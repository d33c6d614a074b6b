"""The stages that go through the rows: right and how fast, what the contract promises of the calls, other packages,
and the Triton kernels."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu_timer import input_sets, measure, ratios, seconds_of
from bench.rows import Row
from bench.rows.peers import PEERS, peers_of
from testing import gpu_checks
from testing.gpu_checks import Function, Inputs, tensors
from testing.gpu_device import Device, UnavailableError
from testing.gpu_samples import require
from tokenprune_kernels._backend import served_by

from .work import Item, Items


def attempted(device: Device, f: Callable[[], Item]) -> Item:
    """A competitor that cannot do this shape, or a profiler that is forbidden, loses its own cell only."""
    try:
        return f()
    except Exception as error:
        if isinstance(error, UnavailableError) or device.broken():
            raise
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def described(row: Row) -> Item:
    """What the report needs of a row."""
    names = ("bytes", "flops", "steps", "targets", "max_launches", "max_microseconds", "min_floor_share", "max_bytes",
             "note")  # fmt: skip
    return {"dtype": str(row.dtype).removeprefix("torch."), **{name: getattr(row, name) for name in names}}


def checked(row: Row, x: Inputs, result: Any) -> dict[str, float]:
    assert row.check is not None, f"{row.name} has no check"
    return row.check(x, result)


@torch.inference_mode()
def time_in_turn(device: Device, row: Row, functions: dict[str, Function]) -> Item:
    """Check, then time in turn. An op whose result is wrong raises here and is not timed."""
    found: Item = {"row": described(row), **require(device, *row.ops)}
    ours, inputs = device.serve(row.ours, *row.ops), row.make(device.torch_device, 0)
    found["backend"] = served_by(row.ops[0], tensors(inputs)[0]) if device.real else "emulator"
    found["check"] = checked(row, inputs, ours(inputs))
    sets = input_sets(device, row, inputs)

    def measured(f: Function, capture: bool = True) -> Item:
        peak = device.peak_bytes(lambda: f(inputs))
        return {**measure(device, f, sets, seconds_of(device), capture), "peak_bytes": peak}

    found["rotated_bytes"] = int(len(sets) * (row.bytes or sum(t.nbytes for t in tensors(inputs))))
    found["times"] = {"ours": measured(ours)}
    for name, f in functions.items():
        found["times"][name] = attempted(device, partial(measured, f, name not in row.uncapturable))
    found["launches"] = attempted(device, lambda: device.launches(lambda: ours(inputs)))
    found["ratios"] = ratios(found["times"])
    return found


@torch.inference_mode()
def behaviour(device: Device, row: Row, repeats: int = 50) -> Item:
    """The promises of gpu_checks.py on the shapes that are timed: there the launches have the grids of real use."""
    found, ours = require(device, *row.ops), device.serve(row.ours, *row.ops)
    inputs, others = (row.make(device.torch_device, seed) for seed in (0, 1))
    checked(row, inputs, ours(inputs))
    threads = device.real or device.forced is None  # Triton's interpreter knows one
    gpu_checks.promises(device, ours, inputs, others, repeats if device.real else 2, threads)
    return found


@torch.inference_mode()
def against(device: Device, row: Row, name: str, load: Callable[[], Function]) -> Item:
    """How far another's result agrees with ours, and both times."""
    call, ours, inputs = load(), device.serve(row.ours, *row.ops), row.make(device.torch_device, 0)
    agreed = attempted(device, lambda: gpu_checks.agreement(call(inputs), ours(inputs)))
    return {**time_in_turn(device, row, {name: call}), "agreement": agreed}


def peer_items(device: Device, rows: list[Row]) -> Items:
    """Other packages on our inputs; one that is not there, or is called otherwise than we know, says so."""
    pairs = [(row, peer) for peer in PEERS for row in rows if peer in peers_of(row.name)]  # what compiles comes last
    return {f"{row.name}: {p.name}": partial(against, device, row, p.name, p.load) for row, p in pairs}


def compiled_items(device: Device, rows: list[Row]) -> Items:
    """torch.compile of the references, by itself because compiling takes long."""

    def load(row: Row) -> Function:
        assert row.compile is not None
        torch._dynamo.reset()
        compiled = torch.compile(row.compile, dynamic=False, backend="inductor" if device.real else "eager")
        return lambda x: compiled(**x)

    compilable = [row for row in rows if row.compile is not None]
    return {row.name: partial(against, device, row, "torch.compile", partial(load, row)) for row in compilable}


@torch.inference_mode()
def first_call(device: Device, row: Row) -> Item:
    """The milliseconds of the first call in this process, until the device is done. It compiles: the stage `triton`
    starts with an empty cache on disk. `triton_warm`, a new process on the same cache, has what a second start of a
    program pays."""
    triton = device.using("triton")
    require(triton, *row.ops)
    ours, inputs = triton.serve(row.ours, *row.ops), row.make(triton.torch_device, 0)
    triton.synchronize()
    began = time.perf_counter()
    ours(inputs)
    triton.synchronize()
    return {"first_call_ms": round((time.perf_counter() - began) * 1e3, 3)}


@torch.inference_mode()
def compare(device: Device, row: Row) -> Item:
    """The Triton kernels on a row: right or not, the same picks as the CUDA kernels, how fast."""
    triton = device.using("triton")
    first = first_call(device, row)
    behaviour(triton, row, repeats=10)
    if all(device.has_kernel(op) for op in row.ops):
        return {**against(triton, row, "cuda", lambda: device.serve(row.ours, *row.ops)), **first}
    return {**time_in_turn(triton, row, {}), **first}
