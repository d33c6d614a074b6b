"""The time that no implementation of a row can beat, from bytes, FLOPs and the rates of a machine. Plain arithmetic."""

from dataclasses import dataclass
from typing import Any

FLOATS = ("bfloat16", "float16", "float32")
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
