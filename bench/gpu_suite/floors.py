"""The rates that floors are made of: assumed ones for predictions, and those that the suite measures on its machine."""

from functools import partial

import torch

from bench.gpu_timer import device_microseconds, measure
from testing.gpu_checks import Function
from testing.gpu_device import Device

from .work import Item, Items

FLOATS = ("bfloat16", "float16", "float32")
Rates = dict[str, float]
# Assumed for predictions only. Rates are what one H200 gave to large torch operations, per second; the rest, which
# model.py alone uses, are published figures and microbenchmarks of Hopper, per cycle and multiprocessor.
ASSUMED = {
    "bandwidth": 4.3e12,
    "L2": 5.5e12,
    "bfloat16": 790e12,
    "float16": 790e12,
    "float32": 50e12,
    "launch": 2.5e-6,
    "next launch": 1.2e-6,  # behind another one in the same stream or graph
    "multiprocessors": 132,
    "clock": 1.75e9,
    "slots": 4,  # instructions
    "special": 16,  # MUFU of a thread
    "cycles of a matrix instruction": 6.5,  # mma.sync m16n8k16 on one of four sub-partitions: 62% of what wgmma reaches
    "cycles of a lone warp": 2,  # from one instruction to the next
    "cycles of a barrier": 30,
    "cycles of a fence": 700,  # GPU-wide, with the cluster barrier behind it
}
SECONDS = 0.05


def floor_seconds(size: float, flops: float, dtype: str, rates: Rates) -> float:
    """Moving so many bytes or doing the products of that dtype, whatever takes longer, and one launch."""
    return max(size / rates["bandwidth"], flops / rates[dtype if dtype in FLOATS else "float32"]) + rates["launch"]


def measured_rates(found: list[Item]) -> Rates | None:
    """Named as the assumed ones, from the items of the stage; None when one is missing."""
    rates = {item["name"]: item["rate"] for item in found if item["status"] == "passed"}
    return rates if rates.keys() >= {"bandwidth", "launch", *FLOATS} else None


def copy_rate(device: Device) -> Item:
    """Bytes read plus bytes written per second of a large copy on the device."""
    size = (1 << 30) if device.real else (1 << 22)
    source, target = torch.randint(0, 256, (2, size), dtype=torch.uint8, device=device.torch_device)
    return rate(device, lambda _: target.copy_(source), 2 * size)


def product_rate(device: Device, dtype: torch.dtype) -> Item:
    """FLOPs per second of a large square product of random matrices; float32 without TF32."""
    n = (4096 if dtype == torch.float32 else 8192) if device.real else 96
    a, b = torch.randn(2, n, n, device=device.torch_device).to(dtype)
    return rate(device, lambda _: a @ b, 2 * n**3)


def rate(device: Device, f: Function, work: int) -> Item:
    measured = measure(device, f, [{}], SECONDS)
    return {"rate": work / device_microseconds(measured) * 1e6, "measured": measured}


def launch_seconds(device: Device) -> Item:
    """An empty kernel, one of many in a graph."""
    measured = measure(device, lambda _: device.empty_launch(), [{}] * 200, SECONDS)
    return {"rate": device_microseconds(measured) / 1e6, "measured": measured}


def items(device: Device) -> Items:
    return {
        "bandwidth": partial(copy_rate, device),
        **{name: partial(product_rate, device, getattr(torch, name)) for name in FLOATS},
        "launch": partial(launch_seconds, device),
    }
