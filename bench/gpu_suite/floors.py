"""The times that no implementation can beat, and the rates they come from.

`python -m bench.gpu_suite.floors` prints what the formulas predict for every row at assumed rates: predictions, and no
measurement. The suite measures the rates on the machine that it runs on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from .device import Device

# Assumed for predictions only: what one H200 gave to large torch operations.
PREDICTED = {"bandwidth": 4.3e12, "bfloat16": 790e12, "float16": 790e12, "float32": 50e12, "launch": 2.5e-6}


def attention_bytes(batch: int, heads: int, key_heads: int, rows: int, keys: int, dim: int, size: int) -> float:
    """Queries and keys read once, scores written once, two numbers per row."""
    return batch * (heads * rows * dim * size + key_heads * keys * dim * size + 4 * keys + 8 * heads * rows)


def attention_flops(batch: int, heads: int, rows: int, keys: int, dim: int) -> float:
    """One product of all queries with all keys."""
    return 2.0 * batch * heads * rows * keys * dim


@dataclass
class Rates:
    """Bytes per second, FLOPs per second by dtype, seconds per launch."""

    bandwidth: float
    launch: float
    flops: dict[str, float]


def predicted_rates() -> Rates:
    return Rates(PREDICTED["bandwidth"], PREDICTED["launch"], {n: PREDICTED[n] for n in FLOATS})


FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def floor_seconds(row: Any, rates: Rates) -> dict[str, float]:
    """Moving the bytes, doing the products, and the larger of both plus one launch."""
    name = str(row.dtype).removeprefix("torch.")
    memory, products = row.bytes / rates.bandwidth, row.flops / rates.flops.get(name, rates.flops["float32"])
    return {"memory": memory, "products": products, "floor": max(memory, products) + rates.launch}


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
        **{f"product {name}": lambda dtype=dtype: product_rate(device, dtype) for name, dtype in FLOATS.items()},
        "empty launch": lambda: launch_seconds(device),
    }


def measured_rates(found: list[dict[str, Any]]) -> Rates | None:
    """From the items of the stage; None when one is missing."""
    by_name = {item["name"]: item for item in found if item["status"] == "passed"}
    try:
        flops = {name: by_name[f"product {name}"]["flops_per_second"] for name in FLOATS}
        launch = by_name["empty launch"]["in_a_graph"]
        return Rates(by_name["copy"]["bytes_per_second"], launch, flops)
    except KeyError:
        return None


def predictions() -> list[tuple[str, float, float, float]]:
    """(row, memory, products, floor) in seconds at the assumed rates."""
    from .device import Host
    from .rows import all_rows

    rates = predicted_rates()
    table = []
    for row in all_rows(Host(emulate=False), toy=False):
        if row.bytes:
            floor = floor_seconds(row, rates)
            table.append((row.name, floor["memory"], floor["products"], floor["floor"]))
    return table


def main() -> None:
    print("| row | bytes, us | products, us | floor with one launch, us |\n|---|---|---|---|")
    for name, memory, products, floor in predictions():
        print(f"| {name} | {memory * 1e6:.2f} | {products * 1e6:.2f} | {floor * 1e6:.2f} |")


if __name__ == "__main__":
    main()
