"""Rows of the cosine ops: normalise, one matrix product, reduce; or torch.cosine_similarity."""

from typing import Any

import torch

import tokenprune_kernels as tp
from bench.shapes import MODELS, Model
from testing.gpu_checks import Inputs

from . import Make, Row, Scale, against, normal, on, short, within

FLOAT, BRAIN = torch.float32, torch.bfloat16


def sizes(model: Model) -> str:
    return f"{model.tokens}x{model.hidden}"


def cosine_inputs(model: Model, m: int, dtype: torch.dtype) -> Make:
    def make(device: torch.device, seed: int) -> Inputs:
        return on(device, {"features": normal(seed, 1, model.tokens, model.hidden, dtype=dtype),
                           "queries": normal(seed + 1000, 1, m, model.hidden, dtype=dtype)})  # fmt: skip

    return make


def contrastive_inputs(model: Model, anchors: int, references: int, dtype: torch.dtype) -> Make:
    def make(device: torch.device, seed: int) -> Inputs:
        order = torch.randperm(model.tokens, generator=torch.Generator().manual_seed(seed)).unsqueeze(0)
        return on(device, {"features": normal(seed, 1, model.tokens, model.hidden, dtype=dtype),
                           "anchor_indices": order[:, :anchors],
                           "reference_indices": order[:, anchors : anchors + references]})  # fmt: skip

    return make


def cosine(name: str, model: Model, m: int, dtype: torch.dtype, reduction: str = "max", **more: Any) -> Row:
    def reference(x: Inputs) -> Any:
        return tp.reference.cosine_scores(**x, reduction=reduction)

    # Without norms and reduction: SparseVLM's raters by hand. A mean needs no product with each query.
    product = (
        {} if m < 64 or reduction == "mean" else {"matrix product alone": lambda x: x["features"] @ x["queries"].mT}
    )

    return Row(
        name,
        ("cosine_scores",),
        cosine_inputs(model, m, dtype),
        lambda x: tp.cosine_scores(**x, reduction=reduction),
        against(reference, 2e-3),
        {"reference": reference, **product},
        unlike=tuple(product),
        bytes=(model.tokens + m) * model.hidden * dtype.itemsize + 4 * model.tokens,
        flops=2.0 * model.tokens * m * model.hidden,
        dtype=dtype,
        agree=within(2e-6),
        seconds=0.5,
        **more,
    )


def contrastive(op: str, model: Model, dtype: torch.dtype, suffix: str = "") -> Row:
    """COAST's numbers: 0.8 K anchors, a tenth of the tokens as references."""
    a, r = max(model.keep * 4 // 5, 1), max(model.tokens // 10, 1)

    def reference(x: Inputs) -> Any:
        return tp.reference.contrastive_scores(**x)

    return Row(
        f"{op} {sizes(model)} A{a} R{r}{suffix}",
        ("contrastive_scores",),
        contrastive_inputs(model, a, r, dtype),
        lambda x: tp.contrastive_scores(**x),
        against(reference, 2e-3),
        {"reference": reference},
        uncapturable=("reference",),  # it reads the index lists
        bytes=model.tokens * model.hidden * dtype.itemsize + 8 * (a + r) + 4 * model.tokens,
        flops=2.0 * model.tokens * (a + 1) * model.hidden,  # the mean over references is one product
        dtype=dtype,
        agree=within(2e-6),
    )


def paired(model: Model, dtype: torch.dtype, frames: int = 32, tokens: int = 196, **more: Any) -> Row:
    """EVS on a video: each token against the same one a frame earlier, both views of one tensor."""

    def make(device: torch.device, seed: int) -> Inputs:
        video = normal(seed, frames + 1, tokens, model.hidden, dtype=dtype)
        return on(device, {"video": video, "copy": torch.empty_like(video[1:])})

    def agree(got: torch.Tensor, ours: torch.Tensor) -> None:  # in the dtype of its inputs
        torch.testing.assert_close(got, ours.to(got.dtype), rtol=0, atol=2e-6 if dtype == FLOAT else 1e-2)

    return Row(
        f"paired cosine {frames}x{tokens}x{model.hidden} {short(dtype)}",
        ("paired_cosine",),
        make,
        lambda x: tp.paired_cosine(x["video"][1:], x["video"][:-1]),
        against(lambda x: tp.reference.paired_cosine(x["video"][1:], x["video"][:-1]), 2e-3),
        {
            "torch.cosine_similarity": lambda x: torch.nn.functional.cosine_similarity(
                x["video"][1:], x["video"][:-1], dim=-1
            ),
            "copy of as many bytes": lambda x: x["copy"].copy_(x["video"][1:]),
        },
        unlike=("copy of as many bytes",),
        targets={"torch.cosine_similarity": 2.0},
        bytes=(frames + 1) * tokens * model.hidden * dtype.itemsize + 4 * frames * tokens,
        dtype=dtype,
        agree=agree,
        seconds=2.0,
        note="at 70% of a copy's rate, the copy would take 0.7 of our time",
        **more,
    )


def gpu_rows(scale: Scale) -> list[Row]:
    models = scale.model("LLaVA-1.5-7B"), scale.model("LLaVA-NeXT-7B")
    plain = tp.reference.cosine_scores
    return [
        *(cosine(f"cosine_scores {sizes(m)} M{m.question}", m, m.question, BRAIN, compile=plain) for m in models),
        *(contrastive("contrastive_scores", m, BRAIN) for m in models),
        *(
            paired(scale.model("Qwen2.5-VL-7B@4096"), dtype, frames, scale(196, 20), max_launches=1)
            for dtype in (BRAIN, FLOAT)
            for frames in (scale(32, 3), 1)  # a clip, and one more frame of a stream
        ),
    ]


def cpu_rows() -> list[Row]:
    models = [MODELS[name] for name in ("LLaVA-1.5-7B", "LLaVA-NeXT-7B")]
    return [
        *(
            cosine(f"cosine {reduction} {sizes(model)} M{m} {short(dtype)}", model, m, dtype, reduction)
            for model in models
            for dtype in (FLOAT, BRAIN)
            for m, reduction in ((1, "max"), (16, "max"), (64, "max"), (64, "mean"))
        ),
        *(contrastive("contrastive", m, dtype, f" {short(dtype)}") for m in models for dtype in (FLOAT, BRAIN)),
        *(paired(MODELS["Qwen2.5-VL-7B@4096"], dtype) for dtype in (FLOAT, BRAIN)),
    ]
