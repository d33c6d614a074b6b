"""Rows of whole methods, from tensors to kept indices: through our ops, and through the eager references."""

import functools
from typing import Any

import torch

import tokenprune_kernels as tp
from bench import method_calls
from bench.op_calls import OpCalls
from bench.shapes import MODELS, Model
from testing.gpu_checks import Inputs

from . import Row, Scale, on

MIN_OVERLAP = 0.9  # of a method's tokens with the reference's: a near tie of a greedy pick changes the picks after it

# Pivot by pivot; budgets and merging beside a selection; raters, clusters and merging; a launch in every round.
LAUNCHES = {"dart": 20, "vidcom2": 11, "visionzip": 11, "sparsevlm": 20, "vispruner": None}


@functools.cache
def ops_of(method: str) -> tuple[str, ...]:
    """The ops that a method calls on a plain prompt; which they are does not depend on sizes."""
    toy = Scale(toy=True).model("LLaVA-1.5-7B")
    with tp.use_backend("auto"), OpCalls() as seen:
        method_calls.calls(toy, method_calls.inputs(toy))[method]()
    return tuple(dict.fromkeys(op for op, _, _ in seen.found))


def method_row(model: Model, method: str, name: str, ops: tuple[str, ...], dtype: torch.dtype, **more: Any) -> Row:
    def make(device: torch.device, seed: int) -> Inputs:
        x = on(device, dict(method_calls.inputs(model, seed)))
        return {n: t if n in ("saliency", "positions") else t.to(dtype) for n, t in x.items()}

    def ours(x: Inputs) -> Any:
        return tuple(method_calls.calls(model, x)[method]()[:2])

    def eager(x: Inputs) -> Any:
        with tp.use_backend("reference"):
            return ours(x)

    def check(x: Inputs, got: Any) -> dict[str, float]:
        want = eager(x)
        assert torch.equal(got[1], want[1]), f"counts {got[1].tolist()}, expected {want[1].tolist()}"
        kept, expected = set(got[0].flatten().tolist()), set(want[0].flatten().tolist())
        overlap = len(kept & expected) / max(len(expected), 1)
        assert overlap >= MIN_OVERLAP, f"only {overlap:.0%} of the kept tokens are the reference's"
        return {"overlap": overlap}

    return Row(name, ops, make, ours, check, {"eager reference": eager}, uncapturable=("eager reference",), **more)


def gpu_rows(scale: Scale) -> list[Row]:
    model = scale.model("LLaVA-1.5-7B")
    return [
        method_row(
            model, method, f"method {method}, {model.name}, {model.keep} of {model.tokens}", ops_of(method),
            torch.bfloat16, targets={"eager reference": 15.0}, max_launches=LAUNCHES.get(method, 8),
            max_microseconds=120.0,
        )
        for method in method_calls.STAGES
    ]  # fmt: skip


def same_selection(got: Any, ours: Any) -> None:
    assert torch.equal(got[0], ours[0])


def cpu_rows() -> list[Row]:
    return [
        method_row(model, method, f"{method}, {model.name}, {model.keep} of {model.tokens}", (), torch.float32,
                   agree=same_selection, seconds=3.0)
        for model in (MODELS[name] for name in ("LLaVA-1.5-7B", "Qwen2.5-VL-7B@4096"))
        for method in method_calls.STAGES
    ]  # fmt: skip
