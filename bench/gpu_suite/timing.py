"""Times of every row, after its result has been found right, and what the contract promises of the same calls.

Inputs rotate through copies that together exceed the L2, so that every call finds its data in device memory, as it does
between the layers of a model. Three times per function: between events around calls in a row (what a stream sees,
gaps between launches included), of a graph of the same calls (the device alone), and of the host to queue a call.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import tokenprune_kernels as tp
from bench.rows import Row, Scale, normal, on
from bench.rows.peers import Peer, peers_of
from testing import gpu_checks
from testing.gpu_checks import Function, Inputs, copied, relative_error, tensors
from testing.gpu_device import Device, flat
from testing.gpu_samples import require

from .work import Item

MAX_SETS, MAX_BYTES = 64, 4 << 30
PASS_SECONDS = 0.02  # one pass over the rotating inputs takes about this at most
REPEATS, DRY_REPEATS = 50, 2  # of a determinism check


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


def measure(device: Device, f: Function, sets: list[Inputs], seconds: float, capture: bool = True) -> Item:
    f(sets[0])
    device.synchronize()
    once = max(device.times(lambda: f(sets[0]), 1)[0], 1e-7)
    used = sets[: max(1, min(len(sets), int(PASS_SECONDS / once)))]

    def one_pass() -> Any:
        return [f(x) for x in used]

    one_pass()
    device.synchronize()
    repeats = max(5 if device.real else 2, min(60, int(seconds / (once * len(used)))))
    found: Item = {"sets": len(used), "events": spread([t / len(used) for t in device.times(one_pass, repeats)])}
    began = time.perf_counter()
    one_pass()
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


def attempted(device: Device, f: Callable[[], Item]) -> Item:
    """A competitor that cannot do this shape, or a profiler that is forbidden, loses its own cell only."""
    try:
        return f()
    except Exception as error:
        if device.broken():
            raise
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def device_microseconds(times: Item) -> float | None:
    """The replay time of the graph if one was captured, else the time between events."""
    best = times.get("graph") or times.get("events")
    return best["median"] if best else None


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
    names = ("bytes", "flops", "steps", "targets", "max_launches", "max_microseconds", "min_floor_share", "note")
    return {"dtype": str(row.dtype).removeprefix("torch."), **{name: getattr(row, name) for name in names}}


def seconds_of(toy: bool, quick: bool) -> float:
    """The statistics of one function and way of timing."""
    return 0.0 if toy else 0.05 if quick else 0.15


def checked(row: Row, x: Inputs, result: Any) -> dict[str, float]:
    assert row.check is not None, f"{row.name} has no check"
    return row.check(x, result)


def time_in_turn(device: Device, row: Row, functions: dict[str, Function], seconds: float) -> Item:
    """Check, then time in turn. An op whose result is wrong raises here and is not timed."""
    found: Item = {"row": described(row), **require(device, *row.ops)}
    ours = device.serve(row.ours, *row.ops)
    with torch.inference_mode():
        inputs = row.make(device.torch_device, 0)
        found["backend"] = tp._backend.served_by(tensors(inputs)[0]) if device.real else "emulator"
        found["check"] = checked(row, inputs, ours(inputs))
        sets = input_sets(device, row, inputs)
        found["rotated_bytes"] = int(len(sets) * (row.bytes or sum(t.nbytes for t in tensors(inputs))))
        found["times"] = {"ours": measure(device, ours, sets, seconds)}
        for name, f in functions.items():
            graph = name not in row.uncapturable
            found["times"][name] = attempted(device, lambda f=f, graph=graph: measure(device, f, sets, seconds, graph))
        found["launches"] = attempted(device, lambda: device.launches(lambda: ours(inputs)))
    found["ratios"] = ratios(found["times"])
    return found


def peak_memory(device: Device, scale: Scale) -> Item:
    """What a call of the scores holds beyond its inputs, against the logits that eager code stores."""
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


def items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    seconds = seconds_of(toy, quick)
    return {
        **{row.name: lambda row=row: time_in_turn(device, row, row.others, seconds) for row in rows},
        "peak memory of the scores": lambda: peak_memory(device, Scale(toy)),
    }


def compiled_items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """torch.compile of the references, by itself because compiling takes long."""

    def run(row: Row) -> Item:
        assert row.compile is not None
        torch._dynamo.reset()
        compiled = torch.compile(row.compile, dynamic=False, backend="eager" if toy else "inductor")
        return time_in_turn(device, row, {"torch.compile": lambda x: compiled(**x)}, seconds_of(toy, quick))

    compilable = [row for row in rows if row.compile is not None]
    return {row.name: lambda row=row: run(row) for row in (compilable[:2] if toy else compilable)}


def peer_items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """Other packages on our inputs; one that is not there, or is called otherwise than we know, says so."""

    def run(row: Row, peer: Peer) -> Item:
        call = peer.load()
        with torch.inference_mode():
            inputs = row.make(device.torch_device, 0)
            first, ours = flat(call(inputs))[0], flat(row.ours(inputs))[0]
        found = time_in_turn(device, row, {peer.name: call}, seconds_of(toy, quick))
        if first.is_floating_point():
            return {**found, "agreement": {"relative_error": relative_error(first.view_as(ours), ours)}}
        theirs, mine = set(first.flatten().tolist()), set(ours.flatten().tolist())
        return {**found, "agreement": {"picks_in_common": len(theirs & mine) / max(len(mine), 1)}}

    return {f"{row.name}: {p.name}": lambda row=row, p=p: run(row, p) for row in rows for p in peers_of(row.name)}


def behaviour_items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """The promises of gpu_checks.py on the shapes that are timed: there the launches have the grids of real use."""
    repeats = DRY_REPEATS if toy else 10 if quick else REPEATS

    def run(row: Row) -> Item:
        found, ours = require(device, *row.ops), device.serve(row.ours, *row.ops)
        with torch.inference_mode():
            inputs, others = (row.make(device.torch_device, seed) for seed in (0, 1))
            checked(row, inputs, ours(inputs))
            gpu_checks.promises(device, ours, inputs, others, repeats)
        return {**found, "repeats": repeats}

    return {row.name: lambda row=row: run(row) for row in rows}
