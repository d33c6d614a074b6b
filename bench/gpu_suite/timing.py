"""Times of every row, after its result has been found right.

Inputs rotate through copies that together exceed the L2, so that every call finds its data in device memory, as it does
between the layers of a model. Three times per function: between events around calls in a row (what a stream sees,
gaps between launches included), of a graph of the same calls (the device alone), and of the host to queue a call.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from .checks import Function, Inputs, copied, tensors
from .device import Device
from .rows import Row, Scale, all_rows, normal, on
from .samples import require
from .work import Item

MAX_SETS, MAX_BYTES = 64, 4 << 30
PASS_SECONDS = 0.02  # one pass over the rotating inputs takes about this at most


def spread(samples: list[float]) -> dict[str, float]:
    """Microseconds: the median, and the tenth and ninetieth percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median": round(median(ordered) * 1e6, 3),
        "p10": round(ordered[round(0.1 * last)] * 1e6, 3),
        "p90": round(ordered[round(0.9 * last)] * 1e6, 3),
        "samples": len(ordered),
    }


def input_sets(device: Device, row: Row, inputs: Inputs) -> list[Inputs]:
    """The inputs and copies of them, so many that a pass over all touches twice the L2, within limits."""
    held = sum(t.numel() * t.element_size() for t in tensors(inputs))
    touched = row.bytes or held
    wanted = -(-2 * device.l2_bytes() // max(int(touched), 1))
    most = MAX_SETS if device.real else 2
    number = max(1, min(wanted, most, MAX_BYTES // max(held, 1), device.free_bytes() // (4 * max(held, 1))))
    return [inputs, *(copied(inputs) for _ in range(number - 1))]


def measure(device: Device, f: Function, sets: list[Inputs], seconds: float, capture: bool) -> Item:
    f(sets[0])
    device.synchronize()
    once = max(device.times(lambda: f(sets[0]), 1)[0], 1e-7)
    used = sets[: max(1, min(len(sets), int(PASS_SECONDS / once)))]

    def one_pass() -> Any:
        return [f(x) for x in used]

    def run() -> None:
        one_pass()

    run()
    device.synchronize()
    repeats = max(5 if device.real else 2, min(60, int(seconds / (once * len(used)))))
    found: Item = {"sets": len(used), "events": spread([t / len(used) for t in device.times(run, repeats)])}
    began = time.perf_counter()
    run()
    found["host"] = round((time.perf_counter() - began) / len(used) * 1e6, 3)
    device.synchronize()
    if capture:
        try:
            captured = device.capture(one_pass)
            captured.replay()
            device.synchronize()
            found["graph"] = spread([t / len(used) for t in device.times(captured.replay, repeats)])
        except Exception as error:
            found["no_graph"] = f"{type(error).__name__}: {str(error)[:300]}"
            if device.broken():
                raise
    return found


def time_in_turn(device: Device, row: Row, functions: dict[str, Function], seconds: float) -> Item:
    """Check, then time in turn. An op whose result is wrong raises here and is not timed."""
    found = require(device, *row.ops)
    with torch.inference_mode():
        inputs = row.make(device.torch_device, 0)
        found["check"] = row.check(device, inputs, row.ours(inputs))
        sets = input_sets(device, row, inputs)
        found["rotated_bytes"] = int(len(sets) * (row.bytes or sum(t.nbytes for t in tensors(inputs))))
        found["times"] = {"ours": measure(device, row.ours, sets, seconds, capture=True)}
        for name, f in functions.items():
            try:
                found["times"][name] = measure(device, f, sets, seconds, capture=name not in row.uncapturable)
            except Exception as error:  # a competitor that cannot do this shape loses its own cell only
                found["times"][name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
                if device.broken():
                    raise
        found["launches"] = guarded(lambda: device.launches(lambda: row.ours(inputs)))
    found["ratios"] = ratios(found["times"])
    return found


def guarded(f: Callable[[], Item]) -> Item:
    """The profiler may be missing or forbidden: that costs its numbers only."""
    try:
        return f()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def ratios(times: dict[str, Item]) -> dict[str, float]:
    """How many times slower than ours, by the times between events."""
    ours = times["ours"]["events"]["median"]
    return {
        name: float(f"{t['events']['median'] / ours:.4g}")
        for name, t in times.items()
        if name != "ours" and "events" in t and ours > 0
    }


def described(row: Row) -> Item:
    """What the report needs of a row."""
    return {
        "bytes": row.bytes, "flops": row.flops, "dtype": str(row.dtype).removeprefix("torch."), "steps": row.steps,
        "targets": row.targets, "max_launches": row.max_launches, "max_microseconds": row.max_microseconds,
        "min_floor_share": row.min_floor_share, "note": row.note,
    }  # fmt: skip


def peak_memory(device: Device, scale: Scale) -> Item:
    """What a call of the scores holds beyond its inputs, against the logits that eager code stores."""
    import tokenprune_kernels as tp

    found = require(device, "cross_attention_scores")
    heads, key_heads, rows, keys = scale(28, 4), scale(4, 2), scale(2000, 20), scale(16384, 64)
    x = on(
        device.torch_device,
        {"query": normal(0, 1, heads, rows, scale(128, 8), dtype=torch.bfloat16),
         "key": normal(1, 1, key_heads, keys, scale(128, 8), dtype=torch.bfloat16)},
    )  # fmt: skip
    op = device.op("cross_attention_scores")
    logits = heads * rows * keys * 4
    with torch.inference_mode():
        ours = device.peak_bytes(lambda: op(**x))
        eager = device.peak_bytes(lambda: tp.reference.cross_attention_scores(**x))
    share = None if ours is None else ours / logits
    return {**found, "peak_bytes": ours, "eager_peak_bytes": eager, "logits_bytes": logits, "share": share, "max": 0.01}


def seconds_of(toy: bool, quick: bool) -> float:
    """The statistics of one function and way of timing."""
    return 0.0 if toy else 0.05 if quick else 0.15


def items(device: Device, toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    seconds = seconds_of(toy, quick)
    found: dict[str, Callable[[], Item]] = {}
    for row in all_rows(device, toy):
        found[row.name] = lambda row=row: {"row": described(row), **time_in_turn(device, row, row.others, seconds)}
    found["peak memory of the scores"] = lambda: peak_memory(device, Scale(toy))
    return found


def compiled_items(device: Device, toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """torch.compile of the references, by itself because compiling takes long."""
    seconds = seconds_of(toy, quick)

    def run(row: Row) -> Item:
        assert row.compile is not None
        torch._dynamo.reset()
        compiled = torch.compile(row.compile, dynamic=False, backend="eager" if toy else "inductor")
        return {"row": described(row), **time_in_turn(device, row, {"torch.compile": lambda x: compiled(**x)}, seconds)}

    rows = [row for row in all_rows(device, toy) if row.compile is not None]
    return {row.name: lambda row=row: run(row) for row in (rows[:2] if toy else rows)}
