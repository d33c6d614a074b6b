"""Rows of the attention scores: in both regimes, from a known lse, of the last row, and from text embeddings."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench import baselines_attention as baselines
from bench.shapes import MODELS, Model
from testing.gpu_checks import Function, Inputs
from testing.gpu_device import on_backend

from . import Make, Row, Scale, against, normal, on, short, within

ON_CHIP = 24 << 20  # bytes of float32 logits that all multiprocessors together can keep: then one product is enough
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def inputs(model: Model, rows: int, dtype: torch.dtype, wide: bool = False, lse: bool = False) -> Make:
    """Queries and keys; `wide` adds the key of every query head in float32, `lse` that of the rows."""

    def make(device: torch.device, seed: int) -> Inputs:
        query = normal(seed, 1, model.query_heads, rows, model.head_dim, dtype=dtype)
        key = normal(seed + 1000, 1, model.key_heads, model.tokens, model.head_dim, dtype=dtype)
        x = on(device, {"query": query, "key": key})
        if wide:
            x["wide"] = x["key"].float().repeat_interleave(model.query_heads // model.key_heads, dim=1)
        if lse:
            x["lse"] = tp.reference.attention_entropy(x["query"], x["key"])[1]
        return x

    return make


def alone(x: Inputs) -> Tensor:
    return baselines.logits_alone(x["query"], x["wide"])


def ours(x: Inputs) -> Any:
    return tp.cross_attention_scores(x["query"], x["key"])


def reference(x: Inputs) -> Any:
    return tp.reference.cross_attention_scores(x["query"], x["key"])


def ours_from_lse(x: Inputs) -> Any:
    return tp.attention_scores(x["query"], x["key"], x["lse"])


def reference_from_lse(x: Inputs) -> Any:
    return tp.reference.attention_scores(x["query"], x["key"], x["lse"])


def ours_entropy(x: Inputs) -> Any:
    return tp.attention_entropy(x["query"], x["key"])


def reference_entropy(x: Inputs) -> Any:
    return tp.reference.attention_entropy(x["query"], x["key"])


def half_logits(x: Inputs) -> Tensor:
    """What eager code in a model does: logits in the input's dtype, softmax in float32, mean over heads and rows."""
    query, key = x["query"], x["key"]
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT / query.shape[-1] ** 0.5
    return logits.softmax(-1, dtype=torch.float32).mean(1).mean(1)


def ours_every_row(x: Inputs) -> Any:
    return tp.cross_attention_scores(x["query"], x["key"], query_reduction="none")


def ours_every_row_from_lse(x: Inputs) -> Any:
    return tp.attention_scores(x["query"], x["key"], x["lse"], query_reduction="none")


TEXT: dict[str, Any] = {"cosine": True, "scale": 100.0, "query_reduction": "max"}


def one_wide_head(model: Model) -> Model:
    """AdaFV compares embeddings of text and image."""
    return replace(model, query_heads=1, key_heads=1, head_dim=model.hidden)


def ours_text(x: Inputs) -> Any:
    return tp.cross_attention_scores(x["query"], x["key"], **TEXT)


def reference_text(x: Inputs) -> Any:
    return tp.reference.cross_attention_scores(x["query"], x["key"], **TEXT)


def published_text(x: Inputs) -> Any:
    return baselines.adafv_text_to_image(x["query"][0], x["key"][0])


# --- on a GPU --------------------------------------------------------------------------------------------------------


def costs(model: Model, rows: int, dtype: torch.dtype, products: int = 1, kept: int = 1) -> dict[str, Any]:
    """Queries and keys read once, scores of `kept` rows and two numbers per row written; all queries times all keys."""
    heads, keys, dim = model.query_heads, model.tokens, model.head_dim
    read = dtype.itemsize * dim * (heads * rows + model.key_heads * keys)
    return {"bytes": read + 4.0 * kept * keys + 8 * heads * rows, "flops": 2.0 * products * heads * rows * keys * dim,
            "dtype": dtype}  # fmt: skip


def scores_row(name: str, model: Model, rows: int, dtype: torch.dtype, targets: dict[str, float]) -> Row:
    heads, question = f"H{model.query_heads}/{model.key_heads}", rows <= 64
    products = 1 if 4 * model.query_heads * rows * model.tokens <= ON_CHIP else 2
    return Row(
        f"scores {name} {heads} M{rows} N{model.tokens} D{model.head_dim} {short(dtype)}",
        ("cross_attention_scores",),
        inputs(model, rows, dtype),
        ours,
        against(reference, 2e-3),
        {"reference": reference, "eager, half-precision logits": half_logits},
        compile=tp.reference.cross_attention_scores if question else None,
        targets=targets,
        max_launches=3 if question else None,
        min_floor_share=0.4 if question else 0.55,
        max_bytes=None if question else 0.01 * 4 * model.query_heads * rows * model.tokens,  # of all logits
        **costs(model, rows, dtype, products),
    )


def gpu_rows(scale: Scale) -> list[Row]:
    llava, qwen = scale.model("LLaVA-1.5-7B"), scale.model("Qwen2.5-VL-7B@16384")
    long, square = replace(llava, tokens=scale(16384, 80)), replace(llava, tokens=scale(4096, 48))
    text = one_wide_head(llava)

    def sizes(model: Model) -> str:
        return f"{model.name} M{model.question} N{model.tokens}"

    def plain(
        name: str, op: str, model: Model, dtype: torch.dtype, f: Function, want: Function, kept: int = 1, **more: Any
    ) -> Row:
        make = inputs(model, model.question, dtype, lse=op == "attention_scores")
        return Row(f"{name} {sizes(model)}", (op,), make, f, against(want, 2e-3), {"reference": want},
                   **costs(model, model.question, dtype, kept=kept), **more)  # fmt: skip

    def from_lse(model: Model, dtype: torch.dtype) -> Row:
        name, op = "scores from lse", "attention_scores"
        return plain(name, op, model, dtype, ours_from_lse, reference_from_lse, max_launches=2)

    def every_row(name: str, op: str, f: Function, launches: int) -> Row:
        return plain(name, op, llava, HALF, f, on_backend(f, "reference"), kept=llava.question, max_launches=launches)

    return [
        scores_row("LLaVA-1.5", llava, llava.question, HALF, {"reference": 5.0}),
        scores_row("Qwen2.5-VL", qwen, qwen.question, BRAIN, {"reference": 10.0}),
        scores_row("long", long, long.question, HALF, {"reference": 5.0, "Flash-ColReduce": 8.0}),
        scores_row("square", square, scale(4096, 40), HALF, {"reference": 6.0}),
        scores_row("last row", llava, 1, HALF, {"reference": 1.0}),
        from_lse(llava, HALF),
        from_lse(qwen, BRAIN),
        plain("attention entropy", "attention_entropy", llava, HALF, ours_entropy, reference_entropy),
        every_row("scores of every row", "cross_attention_scores", ours_every_row, 2),
        every_row("scores of every row from lse", "attention_scores", ours_every_row_from_lse, 1),
        Row(
            f"text-to-image cosine scores {sizes(llava)} D{llava.hidden}",
            ("cross_attention_scores",),
            inputs(text, llava.question, BRAIN),
            ours_text,
            against(reference_text, 5e-3),
            {"reference": reference_text, "published": published_text},
            **costs(text, llava.question, BRAIN),
        ),
    ]


# --- on a CPU --------------------------------------------------------------------------------------------------------


def cpu_row(
    case: str, make: Make, f: Function, others: dict[str, Function], tolerance: float = 1e-5, **more: Any
) -> Row:
    agree = within(tolerance, 1e-3, of_largest=True)
    return Row(case, (), make, f, None, others, unlike=("QK^T alone",), agree=agree, **more)


def last_row(x: Inputs) -> Tensor:
    return baselines.fastv_last_row(x["query"], x["key"])


def coast_rows(x: Inputs) -> Tensor:
    return baselines.coast_rows(x["query"], x["key"])


def ours_coast(x: Inputs) -> Any:
    return tp.cross_attention_scores(x["query"], x["key"], query_reduction="max+last")


def cpu_rows() -> list[Row]:
    llava, qwen, large = (MODELS[n] for n in ("LLaVA-1.5-7B", "Qwen2.5-VL-7B@4096", "Qwen2.5-VL-7B@16384"))
    three = {"reference": reference, "QK^T alone": alone}

    def question(model: Model, dtype: torch.dtype, ratio: float) -> Row:
        case = f"scores, {model.name}, M={model.question}, {short(dtype)}"
        # What torch.compile makes of the reference is compared in float32.
        extra = tp.reference.cross_attention_scores if dtype == FULL and model is not large else None
        make = inputs(model, model.question, dtype, wide=True)
        return cpu_row(case, make, ours, three, targets={"reference": ratio}, seconds=10, compile=extra)

    def from_lse(model: Model) -> Row:
        make = inputs(model, model.question, FULL, wide=True, lse=True)
        others = {"reference": reference_from_lse, "QK^T alone": alone}
        return cpu_row(f"scores from lse, {model.name}, M={model.question}, float32", make, ours_from_lse, others,
                       seconds=6)  # fmt: skip

    def last(model: Model, dtype: torch.dtype) -> Row:
        case = f"last row (FastV, AdaptPrune), {model.name}, {short(dtype)}"
        # The published step rounds its logits to bfloat16.
        return cpu_row(case, inputs(model, 1, dtype), ours, {"reference": reference, "published": last_row},
                       2e-2 if dtype == BRAIN else 1e-5, seconds=2)  # fmt: skip

    def text(dtype: torch.dtype) -> Row:
        make = inputs(one_wide_head(llava), llava.question, dtype, wide=True)
        others = {"reference": reference_text, "published": published_text, "QK^T alone": alone}
        case = f"AdaFV text-to-image, {llava.name}, {short(dtype)}"
        return cpu_row(case, make, ours_text, others, 1e-4, seconds=2)

    wide = inputs(llava, llava.question, FULL, wide=True)
    return [
        *(question(model, dtype, ratio) for dtype in (FULL, BRAIN) for model, ratio in ((llava, 1.4), (qwen, 1.6))),
        question(large, FULL, 1.6),
        from_lse(llava),
        from_lse(qwen),
        cpu_row(f"entropy, {llava.name}, M={llava.question}, float32", wide, ours_entropy,
                {"reference": reference_entropy, "QK^T alone": alone}, seconds=4),
        cpu_row(f"COAST scores (max+last), {llava.name}, M={llava.question}, float32", wide, ours_coast,
                {"published": coast_rows}, seconds=4),
        *(last(model, dtype) for dtype in (FULL, BRAIN) for model in (llava, qwen)),
        *(text(dtype) for dtype in (FULL, BRAIN)),
    ]  # fmt: skip
