"""The rows of the timing table: inputs of a real size, our call, what it is compared with, and what it must reach.

Row files build their rows from a `Scale`: real models on a GPU, toy sizes in a dry run. Bytes and FLOPs are the least
that any implementation has to move and do; floors.py turns them into the time that no version can beat.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.shapes import MODELS, Model

from .checks import Function, Inputs
from .device import Device, flat

Check = Callable[[Device, Inputs, Any], dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """Real sizes, or toys for a dry run."""

    toy: bool

    def model(self, name: str) -> Model:
        model = MODELS[name]
        if not self.toy:
            return model
        return replace(
            model, tokens=36 * min(model.crops, 2), grid=(6, 6), crops=min(model.crops, 2), query_heads=4,
            key_heads=4 if model.key_heads == model.query_heads else 2, head_dim=16, hidden=32, vision_hidden=24,
            layers=2, keep=10, question=6,
        )  # fmt: skip

    def __call__(self, real: int, toy: int) -> int:
        return toy if self.toy else real


@dataclass
class Row:
    name: str
    ops: tuple[str, ...]  # all must have a kernel
    make: Callable[[torch.device, int], Inputs]  # (device, seed)
    ours: Function
    check: Check  # raises AssertionError when our result is wrong
    others: dict[str, Function] = field(default_factory=dict)
    uncapturable: tuple[str, ...] = ()  # functions that wait for the device: a graph cannot hold them
    compile: Function | None = None  # given to torch.compile, in a stage of its own
    bytes: float = 0.0
    flops: float = 0.0
    dtype: torch.dtype = torch.float32  # of the products
    steps: int = 0  # of a greedy loop: each depends on the one before
    targets: dict[str, float] = field(default_factory=dict)  # function -> how many times slower than ours
    max_launches: int | None = None
    max_microseconds: float | None = None
    min_floor_share: float | None = None  # floor / ours
    note: str = ""


def on(device: torch.device, inputs: Inputs) -> Inputs:
    """The inputs on the device; they are drawn on the CPU so that every machine has the same ones."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return [move(v) for v in value] if isinstance(value, list) and flat(value) else value

    return {name: move(value) for name, value in inputs.items()}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def all_rows(device: Device, toy: bool) -> list[Row]:
    from . import rows_greedy, rows_scores, rows_selection

    scale = Scale(toy)
    return [row for module in (rows_scores, rows_greedy, rows_selection) for row in module.rows(device, scale)]
