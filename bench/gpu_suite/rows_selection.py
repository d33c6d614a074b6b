"""Timing rows of selection, compaction and whole methods."""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune_kernels as tp
from bench import method_calls
from bench.shapes import Model

from .checks import Function, Inputs, close
from .device import Device, flat
from .rows import Row, Scale, normal, on

MIN_OVERLAP = 0.9  # of a method's tokens with the reference's: a near tie of a greedy pick changes the picks after it


def attention_like(seed: int, batch: int, n: int) -> Tensor:
    return (normal(seed, batch, n) * 2).softmax(-1)


def equal_to(reference: Function) -> Any:
    def check(device: Device, x: Inputs, ours: Any) -> dict[str, float]:
        return close(device, ours, flat(reference(x))[: len(flat(ours))], 1e-5)

    return check


def topk_and_sort(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def topk_row(device: Device, model: Model, batch: int) -> Row:
    op, k, n = device.op("select_topk"), model.keep, model.tokens

    def eager(x: Inputs) -> Any:
        return tp.reference.select_topk(x["scores"], k)

    return Row(
        f"select_topk {batch}x{n} K{k}",
        ("select_topk",),
        lambda where, seed: on(where, {"scores": attention_like(seed, batch, n)}),
        lambda x: op(x["scores"], k),
        equal_to(eager),
        {"torch.topk + sort": lambda x: topk_and_sort(x["scores"], k), "eager reference": eager},
        bytes=batch * (4 * n + 8 * k + 8),
        targets={"torch.topk + sort": 4.0} if n <= 4096 else {},
        max_launches=1 if n <= 4096 else None,
    )


def selection_rows(device: Device, model: Model) -> list[Row]:
    """The other selecting ops on one image."""
    k, n = model.keep, model.tokens
    two, mixture, compact, entropy = (
        device.op(op) for op in ("select_two_tailed", "select_mixture", "mask_to_indices", "score_entropy")
    )

    def scores(where: torch.device, seed: int) -> Inputs:
        return on(where, {"scores": attention_like(seed, 1, n), "num_low": torch.tensor([k // 10])})

    def both(where: torch.device, seed: int) -> Inputs:
        return on(where, {"text": attention_like(seed, 1, n), "visual": attention_like(seed + 1000, 1, n)})

    def mask(where: torch.device, seed: int) -> Inputs:
        return on(where, {"mask": normal(seed, 1, n) < 0})

    def eager_two(x: Inputs) -> Any:
        return tp.reference.select_two_tailed(x["scores"], x["num_low"], k)

    def eager_mixture(x: Inputs) -> Any:
        return tp.reference.select_mixture(x["text"], x["visual"], k)

    def eager_compact(x: Inputs) -> Any:
        return tp.reference.mask_to_indices(x["mask"], k)

    def eager_entropy(x: Inputs) -> Any:
        return tp.reference.score_entropy(x["scores"])

    return [
        Row(f"select_two_tailed 1x{n} K{k}", ("select_two_tailed",), scores,
            lambda x: two(x["scores"], x["num_low"], k), equal_to(eager_two), {"eager reference": eager_two},
            bytes=4 * n + 8 * k + 16, max_launches=1),
        Row(f"select_mixture 1x{n} K{k}", ("select_mixture",), both,
            lambda x: mixture(x["text"], x["visual"], k), equal_to(eager_mixture), {"eager reference": eager_mixture},
            bytes=8 * n + 8 * k + 16, max_launches=1),
        Row(f"mask_to_indices 1x{n} K{k}", ("mask_to_indices",), mask, lambda x: compact(x["mask"], k),
            equal_to(eager_compact),
            {"eager reference": eager_compact, "nonzero_static": lambda x: x["mask"].nonzero_static(size=k)},
            bytes=n + 8 * k + 8, max_launches=1),
        Row(f"score_entropy 1x{n}", ("score_entropy",), scores, lambda x: entropy(x["scores"]),
            equal_to(eager_entropy), {"eager reference": eager_entropy},
            compile=lambda scores, num_low: tp.reference.score_entropy(scores), bytes=4 * n + 4, max_launches=1),
    ]  # fmt: skip


def gather_rows(device: Device, model: Model, eager: float | None, share: float | None) -> list[Row]:
    """Hidden states, positions, mask and the caches of all layers, as one pruning step keeps them."""
    op, k, n, half = device.op("gather_compact"), model.keep, model.tokens, torch.bfloat16
    dims = [1, 2, 1, *[2] * (2 * model.layers)]
    batch_dims = [0, 1, 0, *[0] * (2 * model.layers)]

    def make(where: torch.device, seed: int) -> Inputs:
        # Drawn on the device: these are gigabytes, and equal results are all that matters.
        draw = torch.Generator(where).manual_seed(seed)

        def values(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=where, dtype=half)

        caches = [values(1, model.key_heads, n, model.head_dim) for _ in range(2 * model.layers)]
        positions = torch.arange(3 * n, device=where).view(3, 1, n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values
        return {
            "tensors": [values(1, n, model.hidden), positions, values(1, n) > 0, *caches],
            "indices": order.unsqueeze(0).to(where),
        }

    def select(x: Inputs) -> list[Tensor]:
        return [t.index_select(d, x["indices"][0]) for t, d in zip(x["tensors"], dims, strict=True)]

    def gather(x: Inputs) -> list[Tensor]:
        kept = []
        for t, dim, batch in zip(x["tensors"], dims, batch_dims, strict=True):
            shape = [1] * t.dim()
            shape[batch], shape[dim] = x["indices"].shape
            index = x["indices"].view(shape).expand([k if d == dim else s for d, s in enumerate(t.shape)])
            kept.append(t.gather(dim, index))
        return kept

    def check(on_device: Device, x: Inputs, ours: Any) -> dict[str, float]:
        return close(on_device, ours, select(x), 0.0)

    token = model.hidden * 2 + 3 * 8 + 1 + 2 * model.layers * model.key_heads * model.head_dim * 2
    row = Row(
        f"gather_compact hidden + positions + mask + {model.layers} layers of KV, {n} -> {k}",
        ("gather_compact",),
        make,
        lambda x: op(x["tensors"], x["indices"], dims=dims, batch_dims=batch_dims),
        check,
        {"torch.gather per tensor": gather, "index_select per tensor": select},
        bytes=2.0 * k * token + 8 * k,
        targets={"torch.gather per tensor": eager} if eager else {},
        max_launches=1,
        min_floor_share=share,
    )
    return [row]


class _Calls(TorchDispatchMode):
    """Remembers which of our ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "tokenprune":
            self.ops[name] = None
        return func(*args, **(kwargs or {}))


@functools.cache
def ops_of(method: str) -> tuple[str, ...]:
    """The ops that a method calls on a plain prompt; which they are does not depend on sizes."""
    toy = Scale(toy=True).model("LLaVA-1.5-7B")
    with tp.use_backend("auto"), _Calls() as seen:
        method_calls.calls(toy, method_calls.inputs(toy))[method]()
    return tuple(seen.ops)


def method_row(device: Device, model: Model, name: str) -> Row:
    def make(where: torch.device, seed: int) -> Inputs:
        x = on(where, dict(method_calls.inputs(model, seed)))
        return {n: t if n in ("saliency", "positions") else t.bfloat16() for n, t in x.items()}

    def on_backend(backend: str, x: Inputs) -> Any:
        with tp.use_backend(backend):
            return tuple(method_calls.calls(model, x)[name]()[:2])

    def ours(x: Inputs) -> Any:
        return on_backend(device.forced or "auto", x)

    def eager(x: Inputs) -> Any:
        return on_backend("reference", x)

    def check(on_device: Device, x: Inputs, got: Any) -> dict[str, float]:
        want = eager(x)
        assert torch.equal(got[1], want[1]), f"counts {got[1].tolist()}, expected {want[1].tolist()}"
        kept, expected = set(got[0].flatten().tolist()), set(want[0].flatten().tolist())
        overlap = len(kept & expected) / max(len(expected), 1)
        assert overlap >= MIN_OVERLAP, f"only {overlap:.0%} of the kept tokens are the reference's"
        return {"overlap": overlap}

    return Row(
        f"method {name}, {model.name}, {model.keep} of {model.tokens}",
        ops_of(name),
        make,
        ours,
        check,
        {"eager method": eager},
        uncapturable=("eager method",),
        targets={"eager method": 15.0},
        max_launches=8,
        max_microseconds=120.0,
    )


def rows(device: Device, scale: Scale) -> list[Row]:
    llava, qwen = scale.model("LLaVA-1.5-7B"), scale.model("Qwen2.5-VL-7B@4096")
    large = scale.model("Qwen2.5-VL-7B@16384")
    compacted = replace(llava, layers=scale(28, 2), key_heads=scale(4, 2))
    return [
        topk_row(device, llava, 1),
        topk_row(device, llava, 16),
        topk_row(device, qwen, 1),
        topk_row(device, large, 1),
        *selection_rows(device, llava),
        *gather_rows(device, compacted, 5.0, None),
        *gather_rows(device, large, None, 0.9),
        *(method_row(device, llava, name) for name in method_calls.STAGES),
    ]
