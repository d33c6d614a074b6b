"""The rates of this machine that the floors of the timing table are made of.

`python -m bench.gpu_suite.floors` prints what the formulas and the machine code predict for every row at assumed rates:
predictions, and no measurement (predictions.py). The suite measures the rates on the machine that it runs on.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from testing.gpu_device import Device

from . import predictions
from .costs import FLOATS


def copy_rate(device: Device) -> dict[str, Any]:
    """Bytes read plus bytes written per second of a large copy on the device."""
    count = (1 << 30) if device.real else (1 << 22)
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = median(device.times(lambda: target.copy_(source), 20))
    return {"bytes_per_second": 2 * count / seconds, "bytes": count, "seconds": seconds}


def small_copy_rate(device: Device) -> dict[str, Any]:
    """The same for 32 MiB, through buffers that together exceed the L2: what a medium-sized op can hope for."""
    count = (32 << 20) if device.real else (1 << 20)
    number = max(2, 4 * device.l2_bytes() // count)
    buffers = [torch.randint(0, 256, (count,), dtype=torch.uint8, device=device.torch_device) for _ in range(number)]

    def rotate() -> None:
        for a, b in zip(buffers[0::2], buffers[1::2], strict=False):
            b.copy_(a)

    rotate()
    seconds = median(device.times(rotate, 20)) / (number // 2)
    return {"bytes_per_second": 2 * count / seconds, "bytes": count, "seconds": seconds}


def product_rate(device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """FLOPs per second of a large square product of random matrices; float32 without TF32."""
    n = (4096 if dtype == torch.float32 else 8192) if device.real else 96
    a, b = (torch.randn(n, n, device=device.torch_device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = median(device.times(lambda: a @ b, 10))
    return {"flops_per_second": 2 * n**3 / seconds, "size": n, "seconds": seconds}


def launch_seconds(device: Device) -> dict[str, Any]:
    """An empty kernel: one of many in a graph, and one of many launched by the host."""
    count = 200

    def many() -> None:
        for _ in range(count):
            device.empty_launch()

    many()
    device.synchronize()
    captured = device.capture(many)
    captured.replay()
    device.synchronize()
    return {
        "in_a_graph": median(device.times(captured.replay, 10)) / count,
        "from_the_host": median(device.times(many, 10)) / count,
    }


def items(device: Device) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "copy": lambda: copy_rate(device),
        "copy of 32 MiB": lambda: small_copy_rate(device),
        **{f"product {name}": lambda name=name: product_rate(device, getattr(torch, name)) for name in FLOATS},
        "empty launch": lambda: launch_seconds(device),
    }


if __name__ == "__main__":
    predictions.main()
