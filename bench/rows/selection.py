"""Rows of the selecting ops and of score_entropy on the sizes of real models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench.shapes import MODELS, Model
from testing.gpu_checks import Function, Inputs

from . import Make, Row, Scale, against, attention_like, compiled, on, same, within


def topk_and_sort(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def scores_of(batch: int, model: Model) -> Make:
    """Scores and what the other selecting ops want beside them."""
    n, k = model.tokens, model.keep

    def make(device: torch.device, seed: int) -> Inputs:
        return on(device, {"scores": attention_like(seed, batch, n), "num_low": torch.tensor([k // 10] * batch)})

    return make


def two_scores(model: Model) -> Make:
    def make(device: torch.device, seed: int) -> Inputs:
        return on(device, {"text": attention_like(seed, 1, model.tokens),
                           "visual": attention_like(seed + 1000, 1, model.tokens)})  # fmt: skip

    return make


def mask_of(model: Model, share: float) -> Make:
    def make(device: torch.device, seed: int) -> Inputs:
        draw = torch.Generator().manual_seed(seed)
        return on(device, {"mask": torch.rand(1, model.tokens, generator=draw) < share})

    return make


def both(call: Callable[[Any, Inputs], Any]) -> tuple[Function, Function]:
    """A call through the package, and through the references."""
    return lambda x: call(tp, x), lambda x: call(tp.reference, x)


def topk(model: Model, batch: int) -> Row:
    ours, reference = both(lambda m, x: m.select_topk(x["scores"], model.keep))
    n, k = model.tokens, model.keep
    return Row(
        f"select_topk {batch}x{n} K{k}",
        ("select_topk",),
        scores_of(batch, model),
        ours,
        against(reference, 1e-5),
        {"torch.topk + sort": lambda x: topk_and_sort(x["scores"], k), "reference": reference},
        targets={"torch.topk + sort": 4.0} if n <= 4096 else {},
        bytes=batch * (4 * n + 8 * k + 8),
        max_launches=1 if n <= 4096 else None,
        agree=same,
        seconds=0.6,
    )


def others_of(model: Model) -> list[Row]:
    """The other ops on one image."""
    n, k = model.tokens, model.keep

    def row(name: str, op: str, make: Make, call: Callable[[Any, Inputs], Any], size: int, **more: Any) -> Row:
        ours, reference = both(call)
        others = {"reference": reference, **more.pop("beside", {})}
        return Row(name, (op,), make, ours, against(reference, 1e-5), others, bytes=size, max_launches=1, seconds=0.6,
                   **{"agree": same, **more})  # fmt: skip

    return [
        row(f"select_two_tailed 1x{n} K{k}", "select_two_tailed", scores_of(1, model),
            lambda m, x: m.select_two_tailed(x["scores"], x["num_low"], k), 4 * n + 8 * k + 16),
        row(f"select_mixture 1x{n} K{k}", "select_mixture", two_scores(model),
            lambda m, x: m.select_mixture(x["text"], x["visual"], k), 8 * n + 8 * k + 16),
        row(f"mask_to_indices 1x{n} K{k}", "mask_to_indices", mask_of(model, k / n),
            lambda m, x: m.mask_to_indices(x["mask"], k), n + 8 * k + 8,
            beside={"nonzero_static": lambda x: x["mask"].nonzero_static(size=k)[:, 1][None]}),
        row(f"score_entropy 1x{n}", "score_entropy", scores_of(1, model),
            lambda m, x: m.score_entropy(x["scores"]), 4 * n + 4,
            compile=lambda scores, num_low: tp.reference.score_entropy(scores), agree=within(1e-5, 1.3e-6)),
    ]  # fmt: skip


def grouped(frames: int, tokens: int, keep: int) -> Row:
    """The crops of an image or the frames of a video, each with the same budget, so that torch.topk can do it too."""
    n = frames * tokens

    def make(device: torch.device, seed: int) -> Inputs:
        return on(device, {"scores": attention_like(seed, 1, n),
                           "groups": torch.arange(frames).repeat_interleave(tokens)[None],
                           "budgets": torch.full((1, frames), keep)})  # fmt: skip

    def equal_groups(x: Inputs) -> Tensor:
        of_group = topk_and_sort(x["scores"].view(frames, tokens), keep)
        return of_group + torch.arange(0, n, tokens, device=of_group.device)[:, None]

    def loop(x: Inputs) -> Tensor:
        kept = []
        for g, budget in enumerate(x["budgets"][0].tolist()):
            token = (x["groups"][0] == g).nonzero()[:, 0]
            kept.append(token[x["scores"][0, token].topk(budget).indices])
        return torch.cat(kept).sort().values

    ours, reference = both(lambda m, x: m.select_grouped_topk(**x, k=frames * keep))
    return Row(
        f"select_grouped_topk {frames} groups of {tokens}, {keep} each",
        ("select_grouped_topk",),
        make,
        ours,
        against(reference, 1e-5),
        {"loop over groups": loop, "torch.topk of equal groups": equal_groups, "reference": reference},
        uncapturable=("loop over groups",),
        targets={"loop over groups": 2.0},
        bytes=n * 12 + 8 * frames + 8 * frames * keep + 8,
        max_launches=1,
        agree=same,
    )


def gpu_rows(scale: Scale) -> list[Row]:
    llava, qwen, large = map(scale.model, ("LLaVA-1.5-7B", "Qwen2.5-VL-7B@4096", "Qwen2.5-VL-7B@16384"))
    groups = (scale(5, 2), 576, 64), (scale(32, 3), 196, 40), (scale(512, 4), 64, 8)  # crops, frames, a long video
    return [topk(llava, 1), topk(llava, 16), topk(qwen, 1), topk(large, 1), *others_of(llava),
            *(grouped(frames, scale(tokens, 20), scale(keep, 4)) for frames, tokens, keep in groups)]  # fmt: skip


def masked(model: Model) -> Row:
    def make(device: torch.device, seed: int) -> Inputs:
        return {**scores_of(1, model)(device, seed), **mask_of(model, 0.9)(device, seed)}

    return Row(
        f"select_topk with a mask, {model.name}, {model.tokens} -> {model.keep}", (), make,
        lambda x: tp.select_topk(x["scores"], model.keep, mask=x["mask"]), None,
        {"masked_fill + torch.topk + sort":
         lambda x: topk_and_sort(x["scores"].masked_fill(~x["mask"], -torch.inf), model.keep)},
        targets={"masked_fill + torch.topk + sort": 1.0}, agree=same, seconds=0.6,
    )  # fmt: skip


def million(dtype: torch.dtype, k: int = 100_000) -> Row:
    narrow = dtype == torch.bfloat16

    def make(device: torch.device, seed: int) -> Inputs:
        scores = torch.randperm(1_000_000, generator=torch.Generator().manual_seed(seed)).float()[None] / 7
        return on(device, {"scores": (scores % 250 if narrow else scores).to(dtype)})

    def stable(x: Inputs) -> Tensor:
        """A million bfloat16 values tie, and torch.topk does not say which of them it takes."""
        return x["scores"].sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values

    other: dict[str, Function] = {"torch.topk + sort": lambda x: topk_and_sort(x["scores"], k)}
    return Row(f"select_topk, {'bfloat16' if narrow else 'float32'}, 1 x 1000000 -> {k}", (), make,
               lambda x: tp.select_topk(x["scores"], k), None, {"stable sort + sort": stable} if narrow else other,
               agree=same)  # fmt: skip


def cpu_rows() -> list[Row]:
    rows = []
    for model in MODELS.values():
        sizes = f"{model.name}, {model.tokens}"
        best = {"select_two_tailed": {"reference": 2.0}, "select_mixture": {"reference": 2.0},
                "mask_to_indices": {"nonzero_static": 1.0}, "score_entropy": {"reference": 1.0}}  # fmt: skip
        for batch in (1, 16):
            case = f"select_topk, {model.name}, {batch} x {model.tokens} -> {model.keep}"
            rows.append(replace(topk(model, batch), name=case, targets={"torch.topk + sort": 1.0}))
        rows.append(masked(model))
        for row in others_of(model):
            (op,) = row.ops
            case = f"{op}, {sizes}" + (f" -> {model.keep}" if op != "score_entropy" else "")
            rows.append(replace(row, name=case, targets=best[op], compile=None))
    llava = MODELS["LLaVA-1.5-7B"]
    mixture = compiled(tp.reference.select_mixture)
    against_compiled = Row(
        f"select_mixture, {llava.name}, against torch.compile", (), two_scores(llava),
        lambda x: tp.select_mixture(x["text"], x["visual"], llava.keep), None,
        {"reference, torch.compile": lambda x: mixture(x["text"], x["visual"], llava.keep)},
        targets={"reference, torch.compile": 1.0}, agree=same, seconds=0.6,
    )  # fmt: skip
    return [*rows, million(torch.float32), million(torch.bfloat16), against_compiled, grouped(5, 576, 64),
            grouped(32, 196, 40)]  # fmt: skip
