"""What README.md shows of the results that are committed, in its table and in docs/figures; the pages have all."""

import json
from statistics import mean
from typing import Any, NamedTuple

from testing import ROOT
from tokenprune_kernels.methods import get_method, method_names

CPU = ROOT / "bench" / "results" / "cpu.json"
RETENTION = ROOT / "studies" / "results" / "retention.json"
LLAVA = "LLaVA-1.5-7B"
QWEN = "Qwen2.5-VL-7B@4096"


class Shown(NamedTuple):
    """A row of cpu.json, and what its bar is called."""

    case: str
    baseline: str
    name: str


SHOWN_OPS = (
    Shown(f"scores, {LLAVA}, M=64, float32", "reference", "scores, N=576, reference"),
    Shown(f"scores, {QWEN}, M=64, float32", "reference", "scores, N=4096, reference"),
    Shown(f"scores, {QWEN}, M=64, float32", "QK^T alone", "scores, N=4096, QK^T alone"),
    Shown(f"max-min, {LLAVA}, image, 576x1024 -> 128", "published loop", "max-min, N=576, published loop"),
    Shown("max-min, LLaVA-NeXT-7B, image, 2880x4096 -> 320", "published loop", "max-min, N=2880, published loop"),
    Shown("NMS 576x4096 K57 float32 patches", "published loop", "NMS, N=576, published loop"),
    Shown(f"28 layers of KV [B,H,T,D], {QWEN}, 4096 -> 910", "index_select", "28 layers of KV, index_select"),
)
SHOWN_METHODS = tuple(
    Shown(f"{stage.name}, {LLAVA}, 128 of 576", "eager reference", stage.name)
    for method in map(get_method, method_names())
    for stage in method.stages
    if not method.baseline
)
# Those of README's table, which is a first look; the figure and the pages have all.
IN_TABLE = ("coast", "adaptprune", "cdpruner", "visionzip", "sparsevlm", "pyramiddrop")


def measured() -> dict[str, Any]:
    """What `make bench` left."""
    results: dict[str, Any] = json.loads(CPU.read_text())
    return results


def retention_command() -> str:
    return str(json.loads(RETENTION.read_text())["command"])


def retained(keep: int = 128) -> dict[str, float]:
    """By method: the share of the unpruned model's accuracy that is left with so many of 576 visual tokens."""
    runs = json.loads(RETENTION.read_text())["runs"]
    own = [run for run in runs if run["layer"] is None and run.get("positions") is None]
    full = next(run["accuracy"] for run in own if run["method"] == "none")
    right: dict[str, list[float]] = {}
    for run in own:  # a random choice has several
        if run["keep"] == keep:
            right.setdefault(run["method"], []).append(run["accuracy"])
    return {name: mean(each) / full for name, each in right.items()}
