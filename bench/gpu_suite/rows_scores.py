"""Timing rows of the scoring ops: attention scores in both regimes, from a known lse, and cosine scores."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench import baselines_attention as baselines
from bench.shapes import Model

from .checks import Function, Inputs, close
from .costs import attention_bytes, attention_flops
from .device import Device, flat
from .rows import Row, Scale, installed, normal, on

ON_CHIP = 24 << 20  # bytes of float32 logits that all multiprocessors together can keep: then one product is enough


def attention_inputs(model: Model, rows: int, dtype: torch.dtype) -> Any:
    def make(device: torch.device, seed: int) -> Inputs:
        query = normal(seed, 1, model.query_heads, rows, model.head_dim, dtype=dtype)
        return on(device, {"query": query, "key": normal(seed + 1000, 1, model.key_heads, model.tokens, model.head_dim,
                                                         dtype=dtype)})  # fmt: skip

    return make


def half_logits(query: Tensor, key: Tensor) -> Tensor:
    """What eager code in a model does: logits in the input's dtype, softmax in float32, mean over heads and rows."""
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, dim=1).mT / query.shape[-1] ** 0.5
    return logits.softmax(-1, dtype=torch.float32).mean(1).mean(1)


def agrees_with(reference: Function, tolerance: float = 2e-3) -> Any:
    def check(device: Device, x: Inputs, ours: Any) -> dict[str, float]:
        return close(device, ours, flat(reference(x))[: len(flat(ours))], tolerance)

    return check


def scores_row(
    device: Device, name: str, model: Model, rows: int, dtype: torch.dtype, eager: float, *, competitor: float = 0.0
) -> Row:
    short = str(dtype).removeprefix("torch.")
    heads, tokens = f"H{model.query_heads}/{model.key_heads}", model.tokens
    op = device.op("cross_attention_scores")
    others: dict[str, Function] = {
        "eager reference": lambda x: tp.reference.cross_attention_scores(**x),
        "eager, half-precision logits": lambda x: half_logits(**x),
    }
    targets = {"eager reference": eager}
    if installed("flash_colreduce") and model.query_heads == model.key_heads:
        from flash_colreduce import flash_colreduce

        others["Flash-ColReduce"] = lambda x: flash_colreduce(x["query"], x["key"], reduction="mean").mean(1)
    if competitor:
        targets["Flash-ColReduce"] = competitor
    products = 1 if 4 * model.query_heads * rows * tokens <= ON_CHIP else 2
    question = rows <= 64
    return Row(
        f"scores {name} {heads} M{rows} N{tokens} D{model.head_dim} {short}",
        ("cross_attention_scores",),
        attention_inputs(model, rows, dtype),
        lambda x: op(**x),
        agrees_with(others["eager reference"]),
        others,
        compile=tp.reference.cross_attention_scores if question else None,
        bytes=attention_bytes(1, model.query_heads, model.key_heads, rows, tokens, model.head_dim, dtype.itemsize),
        flops=products * attention_flops(1, model.query_heads, rows, tokens, model.head_dim),
        dtype=dtype,
        targets=targets,
        max_launches=3 if question else None,
        min_floor_share=0.4 if question else 0.55,
    )


def question_costs(model: Model, dtype: torch.dtype) -> dict[str, float]:
    """Bytes and FLOPs of one product of the question's rows with the visual tokens."""
    heads, rows, tokens, dim = model.query_heads, model.question, model.tokens, model.head_dim
    return {
        "bytes": attention_bytes(1, heads, model.key_heads, rows, tokens, dim, dtype.itemsize),
        "flops": attention_flops(1, heads, rows, tokens, dim),
    }


def from_lse_row(device: Device, model: Model, dtype: torch.dtype) -> Row:
    base = attention_inputs(model, model.question, dtype)
    op = device.op("attention_scores")

    def make(where: torch.device, seed: int) -> Inputs:
        x = base(where, seed)
        return {**x, "lse": tp.reference.attention_entropy(**x)[1]}

    def eager(x: Inputs) -> Any:
        return tp.reference.attention_scores(**x)

    return Row(
        f"scores from lse {model.name} M{model.question} N{model.tokens}",
        ("attention_scores",),
        make,
        lambda x: op(**x),
        agrees_with(eager),
        {"eager reference": eager},
        **question_costs(model, dtype),
        dtype=dtype,
        max_launches=2,
    )  # fmt: skip


def entropy_row(device: Device, model: Model, dtype: torch.dtype) -> Row:
    op = device.op("attention_entropy")

    def eager(x: Inputs) -> Any:
        return tp.reference.attention_entropy(**x)

    return Row(
        f"attention entropy {model.name} M{model.question} N{model.tokens}",
        ("attention_entropy",),
        attention_inputs(model, model.question, dtype),
        lambda x: op(**x),
        agrees_with(eager),
        {"eager reference": eager},
        **question_costs(model, dtype),
        dtype=dtype,
    )  # fmt: skip


def text_row(device: Device, model: Model, dtype: torch.dtype) -> Row:
    """AdaFV's text-to-image scores: embeddings as one wide head, cosine logits, maximum over text rows."""
    op = device.op("cross_attention_scores")
    options: dict[str, Any] = {"cosine": True, "scale": 100.0, "query_reduction": "max"}

    def make(where: torch.device, seed: int) -> Inputs:
        text = normal(seed, 1, 1, model.question, model.hidden, dtype=dtype)
        return on(where, {"query": text, "key": normal(seed + 1000, 1, 1, model.tokens, model.hidden, dtype=dtype)})

    def eager(x: Inputs) -> Any:
        return tp.reference.cross_attention_scores(**x, **options)

    return Row(
        f"text-to-image cosine scores {model.name} M{model.question} N{model.tokens} D{model.hidden}",
        ("cross_attention_scores",),
        make,
        lambda x: op(**x, **options),
        agrees_with(eager, 5e-3),
        {
            "eager reference": eager,
            "published": lambda x: baselines.adafv_text_to_image(x["query"][0], x["key"][0]),
        },
        bytes=attention_bytes(1, 1, 1, model.question, model.tokens, model.hidden, dtype.itemsize),
        flops=attention_flops(1, 1, model.question, model.tokens, model.hidden),
        dtype=dtype,
    )


def cosine_row(device: Device, model: Model, dtype: torch.dtype) -> Row:
    op = device.op("cosine_scores")

    def make(where: torch.device, seed: int) -> Inputs:
        return on(where, {"features": normal(seed, 1, model.tokens, model.hidden, dtype=dtype),
                          "queries": normal(seed + 1000, 1, model.question, model.hidden, dtype=dtype)})  # fmt: skip

    def eager(x: Inputs) -> Any:
        return tp.reference.cosine_scores(**x)

    return Row(
        f"cosine_scores {model.tokens}x{model.hidden} M{model.question}",
        ("cosine_scores",),
        make,
        lambda x: op(**x),
        agrees_with(eager),
        {"eager reference": eager},
        compile=tp.reference.cosine_scores,
        bytes=(model.tokens + model.question) * model.hidden * dtype.itemsize + 4 * model.tokens,
        flops=2.0 * model.tokens * model.question * model.hidden,
        dtype=dtype,
    )


def contrastive_row(device: Device, model: Model, dtype: torch.dtype) -> Row:
    op = device.op("contrastive_scores")
    anchors, references = max(model.keep * 4 // 5, 1), max(model.tokens // 10, 1)

    def make(where: torch.device, seed: int) -> Inputs:
        order = torch.randperm(model.tokens, generator=torch.Generator().manual_seed(seed)).unsqueeze(0)
        return on(where, {"features": normal(seed, 1, model.tokens, model.hidden, dtype=dtype),
                          "anchor_indices": order[:, :anchors],
                          "reference_indices": order[:, anchors : anchors + references]})  # fmt: skip

    def eager(x: Inputs) -> Any:
        return tp.reference.contrastive_scores(**x)

    return Row(
        f"contrastive_scores {model.tokens}x{model.hidden} A{anchors} R{references}",
        ("contrastive_scores",),
        make,
        lambda x: op(**x),
        agrees_with(eager),
        {"eager reference": eager},
        uncapturable=("eager reference",),  # it reads the index lists
        bytes=model.tokens * model.hidden * dtype.itemsize + 8 * (anchors + references) + 4 * model.tokens,
        flops=2.0 * model.tokens * (anchors + 1) * model.hidden,  # the mean over references is one product
        dtype=dtype,
    )


def rows(device: Device, scale: Scale) -> list[Row]:
    llava, qwen = scale.model("LLaVA-1.5-7B"), scale.model("Qwen2.5-VL-7B@16384")
    next_, half, brain = scale.model("LLaVA-NeXT-7B"), torch.float16, torch.bfloat16
    long = replace(llava, tokens=scale(16384, 80))
    square = replace(llava, tokens=scale(4096, 48))
    return [
        scores_row(device, "LLaVA-1.5", llava, llava.question, half, 5.0),
        scores_row(device, "Qwen2.5-VL", qwen, qwen.question, brain, 10.0),
        scores_row(device, "long", long, long.question, half, 5.0, competitor=8.0),
        scores_row(device, "square", square, scale(4096, 40), half, 6.0),
        scores_row(device, "last row", llava, 1, half, 1.0),
        from_lse_row(device, llava, half),
        from_lse_row(device, qwen, brain),
        entropy_row(device, llava, half),
        text_row(device, llava, brain),
        cosine_row(device, llava, brain),
        cosine_row(device, next_, brain),
        contrastive_row(device, llava, brain),
        contrastive_row(device, next_, brain),
    ]
