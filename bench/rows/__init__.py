"""One table of what is timed: inputs of a real size, our call, what it is compared with, and what it must reach.

Two timers read it: bench/bench_rows.py on a CPU (pytest-benchmark), bench/gpu_suite on a GPU (events and graphs). A
file is about one family, with its rows for each of them. `ours` calls the package as users do; who times it chooses the
backend. Bytes and FLOPs are the least that any implementation has to move and do.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.shapes import MODELS, Model
from testing.gpu_checks import Function, Inputs, close
from testing.gpu_device import flat

Check = Callable[[Inputs, Any], dict[str, float]]
Make = Callable[[torch.device, int], Inputs]


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
    make: Make  # (device, seed)
    ours: Function
    check: Check | None  # of inputs and our result; raises AssertionError when it is wrong. None: only the others say
    others: dict[str, Function] = field(default_factory=dict)
    unlike: tuple[str, ...] = ()  # of the others: what computes something else and is not compared
    uncapturable: tuple[str, ...] = ()  # functions that wait for the device: a graph cannot hold them
    compile: Function | None = None  # given to torch.compile
    targets: dict[str, float] = field(default_factory=dict)  # function -> how many times slower than ours
    note: str = ""
    # Of a GPU:
    bytes: float = 0.0
    flops: float = 0.0
    dtype: torch.dtype = torch.float32  # of the products
    steps: int = 0  # of a greedy loop: each depends on the one before
    max_launches: int | None = None
    max_microseconds: float | None = None
    min_floor_share: float | None = None  # floor / ours
    max_bytes: float | None = None  # that a call holds beyond its inputs
    # Of a CPU:
    agree: Callable[[Any, Any], None] | None = None  # another's result and ours
    seconds: float = 1.0
    busy: bool = False  # other processes want all cores meanwhile


def on(device: torch.device, inputs: Inputs) -> Inputs:
    """The inputs on the device; they are drawn on the CPU so that every machine has the same ones."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return [move(v) for v in value] if isinstance(value, list) and flat(value) else value

    return {name: move(value) for name, value in inputs.items()}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_like(seed: int, batch: int, n: int) -> Tensor:
    return (normal(seed, batch, n) * 2).softmax(-1)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at the first call: importing its machinery takes seconds."""
    made = functools.cache(lambda: torch.compile(function))
    return lambda *args, **kwargs: made()(*args, **kwargs)


def against(reference: Function, tolerance: float) -> Check:
    """Integers equal to the reference's, floats within the tolerance of its norm."""
    return lambda x, ours: close(ours, flat(reference(x))[: len(flat(ours))], tolerance)


def same(got: Any, ours: Any) -> None:
    """As many outputs as both have are equal."""
    for g, o in zip(flat(got), flat(ours), strict=False):
        assert torch.equal(g.flatten(), o.flatten())


def within(tolerance: float, relative: float = 0.0, of_largest: bool = False) -> Callable[[Any, Any], None]:
    """As many outputs as both have differ by at most the tolerance, of the largest value when asked for."""

    def agree(got: Any, ours: Any) -> None:
        for g, o in zip(flat(got), flat(ours), strict=False):
            scale = float(o.abs().max()) if of_largest else 1.0
            torch.testing.assert_close(g.view_as(o), o, rtol=relative, atol=tolerance * scale)

    return agree


def matching(rows: list[Row], pattern: str) -> list[Row]:
    """Those whose name the regular expression finds something in."""
    return [row for row in rows if re.search(pattern, row.name)]


def gpu_rows(scale: Scale) -> list[Row]:
    families = (
        "attention", "similarity", "repulsion", "greedy", "nms", "selection", "merging", "density", "compaction",
        "packed", "methods",
    )  # fmt: skip
    return [row for name in families for row in importlib.import_module(f".{name}", __name__).gpu_rows(scale)]


def cpu_rows() -> list[Row]:
    from . import attention, compaction, density, merging, methods, nms, repulsion, selection, similarity

    families = (attention, compaction, density, merging, methods, nms, repulsion, selection, similarity)
    return [row for family in families for row in family.cpu_rows()]
