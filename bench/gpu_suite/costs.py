"""The time that no implementation of a row can beat, from bytes, FLOPs and the rates of a machine. Plain arithmetic."""

from dataclasses import dataclass
from typing import Any

FLOATS = ("bfloat16", "float16", "float32")
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
    return Rates(ASSUMED["bandwidth"], ASSUMED["launch"], {name: ASSUMED[name] for name in FLOATS})


def floor_seconds(row: Any, rates: Rates) -> dict[str, float]:
    """Moving the bytes, doing the products, and the larger of both plus one launch."""
    name = str(row.dtype).removeprefix("torch.")
    memory, products = row.bytes / rates.bandwidth, row.flops / rates.flops.get(name, rates.flops["float32"])
    return {"memory": memory, "products": products, "floor": max(memory, products) + rates.launch}


def measured_rates(found: list[dict[str, Any]]) -> Rates | None:
    """From the items of the stage; None when one is missing."""
    by_name = {item["name"]: item for item in found if item["status"] == "passed"}
    try:
        flops = {name: by_name[f"product {name}"]["flops_per_second"] for name in FLOATS}
        launch = by_name["empty launch"]["in_a_graph"]
        return Rates(by_name["copy"]["bytes_per_second"], launch, flops)
    except KeyError:
        return None
