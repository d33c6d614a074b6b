"""The timer of a GPU, as `race` in conftest.py is that of a CPU: both time the rows of bench/rows.

Inputs rotate through copies that together exceed the L2, so that every call finds its data in device memory, as it does
between the layers of a model. Three times per function: between events around calls in a row (what a stream sees,
gaps between launches included), of a graph of the same calls (the device alone), and of the host to queue a call.
"""

import time
from statistics import median
from typing import Any

from testing.gpu_checks import Function, Inputs, copied, tensors
from testing.gpu_device import Device

from .rows import Row

Times = dict[str, Any]
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


def measure(device: Device, f: Function, sets: list[Inputs], seconds: float, capture: bool = True) -> Times:
    f(sets[0])
    device.synchronize()
    once = max(device.times(lambda: f(sets[0]), 1)[0], 1e-7)
    used = sets[: max(1, min(len(sets), int(PASS_SECONDS / once)))]

    def one_pass() -> Any:
        return [f(x) for x in used]

    one_pass()
    device.synchronize()
    repeats = max(5 if device.real else 2, min(60, int(seconds / (once * len(used)))))
    found: Times = {"sets": len(used), "events": spread([t / len(used) for t in device.times(one_pass, repeats)])}
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


def device_microseconds(times: Times) -> float:
    """The replay time of the graph if one was captured, else the time between events."""
    return float((times.get("graph") or times["events"])["median"])


def ratios(times: dict[str, Times]) -> dict[str, float]:
    """How many times slower than ours, by the times between events."""
    ours = times["ours"]["events"]["median"]
    return {
        name: float(f"{t['events']['median'] / ours:.4g}")
        for name, t in times.items()
        if name != "ours" and "events" in t and ours > 0
    }


def seconds_of(device: Device) -> float:
    """The statistics of one function and way of timing."""
    return 0.15 if device.real else 0.0
