"""Attention scores on the CPU: against the reference, the product Q K^T alone, and the published scoring steps."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench import baselines_attention as baselines
from bench.shapes import MODELS, Model

Race = Callable[..., dict[str, float]]
LLAVA, QWEN, QWEN_LARGE = (MODELS[n] for n in ("LLaVA-1.5-7B", "Qwen2.5-VL-7B@4096", "Qwen2.5-VL-7B@16384"))


def tensors(model: Model, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(1, model.query_heads, rows, model.head_dim).to(dtype)
    return query, torch.randn(1, model.key_heads, model.tokens, model.head_dim).to(dtype)


def expanded(query: Tensor, key: Tensor) -> Tensor:
    return key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def agree(*ignored: str, tolerance: float = 1e-5) -> Callable[[dict[str, Any]], None]:
    """Every function but the ignored ones gives ours' first output within the tolerance of its largest value."""

    def check(results: dict[str, Any]) -> None:
        ours = results["ours"][0] if isinstance(results["ours"], tuple) else results["ours"]
        for name, result in results.items():
            if name not in ignored:
                other = result[0] if isinstance(result, tuple) else result
                torch.testing.assert_close(other, ours, rtol=1e-3, atol=tolerance * float(ours.abs().max()))

    return check


@pytest.mark.parametrize(
    ("model", "dtype", "ratio"),
    [
        (LLAVA, torch.float32, 1.4),
        (QWEN, torch.float32, 1.6),
        (LLAVA, torch.bfloat16, 1.4),
        (QWEN, torch.bfloat16, 1.6),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value).removeprefix("torch."),
)
def test_question_against_image(race: Race, model: Model, dtype: torch.dtype, ratio: float) -> None:
    query, key = tensors(model, model.question, dtype)
    wide = expanded(query, key)
    functions = {
        "ours": lambda: tp.cross_attention_scores(query, key),
        "reference": lambda: tp.reference.cross_attention_scores(query, key),
        "QK^T alone": lambda: baselines.logits_alone(query, wide),
    }
    if dtype == torch.float32:
        compiled = torch.compile(tp.reference.cross_attention_scores)
        functions["torch.compile of the reference"] = lambda: compiled(query, key)
    race(
        f"scores, {model.name}, M={model.question}, {str(dtype).removeprefix('torch.')}",
        functions,
        check=agree("QK^T alone"),
        target=("reference", ratio),
        seconds=10,
    )


def test_large_image(race: Race) -> None:
    query, key = tensors(QWEN_LARGE, QWEN_LARGE.question)
    wide = expanded(query, key)
    race(
        f"scores, {QWEN_LARGE.name}, M={QWEN_LARGE.question}, float32",
        {
            "ours": lambda: tp.cross_attention_scores(query, key),
            "reference": lambda: tp.reference.cross_attention_scores(query, key),
            "QK^T alone": lambda: baselines.logits_alone(query, wide),
        },
        check=agree("QK^T alone"),
        target=("reference", 1.6),
        seconds=10,
    )


@pytest.mark.parametrize("model", [LLAVA, QWEN], ids=lambda m: m.name)
def test_with_known_lse(race: Race, model: Model) -> None:
    query, key = tensors(model, model.question)
    wide = expanded(query, key)
    lse = tp.attention_entropy(query, key)[1]
    race(
        f"scores from lse, {model.name}, M={model.question}, float32",
        {
            "ours": lambda: tp.attention_scores(query, key, lse),
            "reference": lambda: tp.reference.attention_scores(query, key, lse),
            "QK^T alone": lambda: baselines.logits_alone(query, wide),
        },
        check=agree("QK^T alone"),
        seconds=6,
    )


def test_entropy(race: Race) -> None:
    query, key = tensors(LLAVA, LLAVA.question)
    wide = expanded(query, key)
    race(
        f"entropy, {LLAVA.name}, M={LLAVA.question}, float32",
        {
            "ours": lambda: tp.attention_entropy(query, key),
            "reference": lambda: tp.reference.attention_entropy(query, key),
            "QK^T alone": lambda: baselines.logits_alone(query, wide),
        },
        check=agree("QK^T alone"),
        seconds=4,
    )


def test_coast_rows(race: Race) -> None:
    query, key = tensors(LLAVA, LLAVA.question)
    race(
        f"COAST scores (max+last), {LLAVA.name}, M={LLAVA.question}, float32",
        {
            "ours": lambda: tp.cross_attention_scores(query, key, query_reduction="max+last"),
            "published": lambda: baselines.coast_rows(query, key),
        },
        check=agree(),
        seconds=4,
    )


@pytest.mark.parametrize("model", [LLAVA, QWEN], ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_last_row(race: Race, model: Model, dtype: torch.dtype) -> None:
    query, key = tensors(model, 1, dtype)
    narrow = dtype == torch.bfloat16  # the published step rounds its logits to bfloat16
    race(
        f"last row (FastV, AdaptPrune), {model.name}, {str(dtype).removeprefix('torch.')}",
        {
            "ours": lambda: tp.cross_attention_scores(query, key),
            "reference": lambda: tp.reference.cross_attention_scores(query, key),
            "published": lambda: baselines.fastv_last_row(query, key),
        },
        check=agree(tolerance=2e-2 if narrow else 1e-5),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_text_embeddings(race: Race, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    text = torch.randn(1, 1, LLAVA.question, LLAVA.hidden).to(dtype)
    image = torch.randn(1, 1, LLAVA.tokens, LLAVA.hidden).to(dtype)
    options: dict[str, Any] = {"cosine": True, "scale": 100.0, "query_reduction": "max"}
    race(
        f"AdaFV text-to-image, {LLAVA.name}, {str(dtype).removeprefix('torch.')}",
        {
            "ours": lambda: tp.cross_attention_scores(text, image, **options),
            "reference": lambda: tp.reference.cross_attention_scores(text, image, **options),
            "published": lambda: baselines.adafv_text_to_image(text[0], image[0]),
            "QK^T alone": lambda: baselines.logits_alone(text, image.float()),
        },
        check=agree("QK^T alone", tolerance=1e-4),
    )


@pytest.mark.parametrize("key_heads", [4, 28])
def test_peak_memory(benchmark: Any, key_heads: int) -> None:
    """Peak memory that one call adds at M = 2000, N = 16384, 28 heads, in a process of its own."""
    script = f"""
import torch, tokenprune_kernels as tp
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
query, key = torch.randn(1, 28, 2000, 8), torch.randn(1, {key_heads}, 16384, 8)
tp.cross_attention_scores(query[:, :, :100], key[:, :, :64])
before = peak()
tp.cross_attention_scores(query, key)
print(peak() - before)
"""

    def measure() -> int:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return int(done.stdout)

    extra = benchmark.pedantic(measure, rounds=1)
    matrix = 28 * 2000 * 16384 * 4
    benchmark.extra_info.update(peak_extra_bytes=extra, logits_bytes=matrix, share=extra / matrix)
    print(f"\nHkv = {key_heads}: {extra / 2**20:.1f} MiB, {100 * extra / matrix:.2f}% of the logits")
