"""Rows of gather_compact on what a pruned model really keeps, against index_select and torch.gather for each tensor."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench.shapes import MODELS, Model
from testing.gpu_checks import Function, Inputs, close

from . import Row, Scale, same

Tensors = Callable[[Callable[..., Tensor]], list[Tensor]]  # of a function that draws


def kept_tokens(model: Model, seed: int, batch: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(model.tokens, generator=draw)[: model.keep].sort().values for _ in range(batch)])


def gather_row(
    name: str,
    model: Model,
    tensors: Tensors,
    dims: list[int],
    batch_dims: list[int] | None = None,
    batch: int = 1,
    **more: Any,
) -> Row:
    firsts = batch_dims or [0] * len(dims)

    def make(device: torch.device, seed: int) -> Inputs:
        draw = torch.Generator(device).manual_seed(seed)  # on the device: these may be gigabytes

        def values(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device)

        return {"tensors": tensors(values), "indices": kept_tokens(model, seed, batch).to(device)}

    def select(x: Inputs) -> list[Tensor]:
        return [t.index_select(d, x["indices"][0]) for t, d in zip(x["tensors"], dims, strict=True)]

    def gather(x: Inputs) -> list[Tensor]:
        """Per tensor, with the index expanded to its shape: what works for any batch size."""
        kept = []
        for t, dim, first in zip(x["tensors"], dims, firsts, strict=True):
            shape = [1] * t.dim()
            shape[first], shape[dim] = x["indices"].shape
            index = x["indices"].view(shape).expand([model.keep if d == dim else s for d, s in enumerate(t.shape)])
            kept.append(t.gather(dim, index))
        return kept

    others: dict[str, Function] = {"torch.gather": gather}
    if batch == 1:  # index_select has no answer for different tokens of each sample
        others = {"index_select": select, **others}
    return Row(
        name,
        ("gather_compact",),
        make,
        lambda x: tp.gather_compact(x["tensors"], x["indices"], dims=dims, batch_dims=batch_dims),
        lambda x, ours: close(ours, gather(x), 0.0),
        others,
        agree=same,
        **more,
    )


def step_tensors(model: Model) -> Tensors:
    """Hidden states, positions, mask and the caches of all layers, as one pruning step keeps them."""

    def tensors(values: Callable[..., Tensor]) -> list[Tensor]:
        n = model.tokens
        hidden = values(1, n, model.hidden).bfloat16()
        caches = [values(1, model.key_heads, n, model.head_dim).bfloat16() for _ in range(2 * model.layers)]
        return [hidden, torch.arange(3 * n, device=hidden.device).view(3, 1, n), values(1, n) > 0, *caches]

    return tensors


def step_row(model: Model, **more: Any) -> Row:
    caches, k = 2 * model.layers, model.keep
    token = model.hidden * 2 + 3 * 8 + 1 + caches * model.key_heads * model.head_dim * 2
    return gather_row(
        f"gather_compact hidden + positions + mask + {model.layers} layers of KV, {model.tokens} -> {k}", model,
        step_tensors(model), [1, 2, 1, *[2] * caches], [0, 1, 0, *[0] * caches],
        bytes=2.0 * k * token + 8 * k, max_launches=1, **more,
    )  # fmt: skip


def gpu_rows(scale: Scale) -> list[Row]:
    llava, large = scale.model("LLaVA-1.5-7B"), scale.model("Qwen2.5-VL-7B@16384")
    compacted = replace(llava, layers=scale(28, 2), key_heads=scale(4, 2))
    return [step_row(compacted, targets={"torch.gather": 5.0}), step_row(large, min_floor_share=0.9)]


def cpu_rows() -> list[Row]:
    llava, next_, qwen = (MODELS[name] for name in ("LLaVA-1.5-7B", "LLaVA-NeXT-7B", "Qwen2.5-VL-7B@4096"))
    faster: dict[str, Any] = {"targets": {"index_select": 1.0}}

    def hidden(model: Model, dtype: torch.dtype) -> Row:
        return gather_row(f"hidden {dtype}, {model.name}, {model.tokens} x {model.hidden} -> {model.keep}", model,
                          lambda values: [values(1, model.tokens, model.hidden).to(dtype)], [1], **faster)  # fmt: skip

    def step(values: Callable[..., Tensor]) -> list[Tensor]:
        n = llava.tokens
        return [values(1, n, llava.hidden), torch.arange(n)[None], torch.ones(1, n).bool()]

    def alone(kind: str, t: Tensor) -> Row:
        return gather_row(f"{kind} alone, {llava.name}", llava, lambda values: [t], [1], seconds=0.5,
                          note="call overhead: the Python function checks its arguments")  # fmt: skip

    def caches(layout: str) -> Row:
        shape = (1, qwen.key_heads, qwen.tokens, qwen.head_dim)
        view = (1, qwen.tokens, qwen.key_heads, qwen.head_dim)

        def tensors(values: Callable[..., Tensor]) -> list[Tensor]:
            dense = layout == "[B,H,T,D]"
            return [values(*shape).bfloat16() if dense else values(*view).bfloat16().transpose(1, 2)
                    for _ in range(2 * qwen.layers)]  # fmt: skip

        return gather_row(f"{qwen.layers} layers of KV {layout}, {qwen.name}, {qwen.tokens} -> {qwen.keep}", qwen,
                          tensors, [2] * (2 * qwen.layers), seconds=3.0, **faster)  # fmt: skip

    def indexed(x: Inputs) -> list[Tensor]:
        return [x["tensors"][0][torch.arange(8)[:, None], x["indices"]]]

    batch = gather_row(f"hidden float16, {llava.name}, batch 8", llava,
                       lambda values: [values(8, llava.tokens, llava.hidden).half()], [1], batch=8,
                       targets={"torch.gather": 1.0})  # fmt: skip
    batch.others["advanced indexing"] = indexed
    return [
        *(hidden(model, dtype) for model in (llava, next_) for dtype in (torch.float32, torch.float16)),
        gather_row(f"hidden, positions and mask, {llava.name}", llava, step, [1, 1, 1], **faster),
        alone("positions", torch.arange(llava.tokens)[None]),
        alone("mask", torch.ones(1, llava.tokens).bool()),
        caches("[B,H,T,D]"),
        caches("view of [B,T,H,D]"),
        batch,
    ]
