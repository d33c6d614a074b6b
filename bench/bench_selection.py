"""Selection ops on the sizes of real models, against torch.topk + sort, nonzero_static and the references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenprune_kernels as tp

from .shapes import MODELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
over_models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def attention_like(batch: int, n: int) -> torch.Tensor:
    return (torch.randn(batch, n) * 2).softmax(-1)


def same_indices(results: dict[str, Any]) -> None:
    for name, result in results.items():
        for got, want in zip(result, results["ours"], strict=False):
            assert torch.equal(got, want), name


def topk_and_sort(scores: torch.Tensor, k: int) -> tuple[torch.Tensor]:
    return (scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values,)


@over_models
@pytest.mark.parametrize("batch", [1, 16])
def test_topk(race: Any, model: Any, batch: int) -> None:
    scores = attention_like(batch, model.tokens)
    race(
        f"select_topk, {model.name}, {batch} x {model.tokens} -> {model.keep}",
        {
            "ours": lambda: tp.select_topk(scores, model.keep),
            "torch.topk + sort": lambda: topk_and_sort(scores, model.keep),
            "reference": lambda: tp.reference.select_topk(scores, model.keep),
        },
        check=same_indices,
        target=("torch.topk + sort", 1.0),
        seconds=0.6,
    )


@over_dtypes
def test_topk_of_a_million(race: Any, dtype: str) -> None:
    scores = torch.randperm(1_000_000).float()[None] / 7
    scores, k = (scores % 250 if dtype == "bfloat16" else scores).to(DTYPES[dtype]), 100_000
    functions: dict[str, Callable[[], Any]] = {"ours": lambda: tp.select_topk(scores, k)}
    if dtype == "bfloat16":  # a million bfloat16 values tie, and torch.topk does not say which of them it takes
        functions["stable sort + sort"] = lambda: (
            scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values,
        )
    else:
        functions["torch.topk + sort"] = lambda: topk_and_sort(scores, k)
    race(f"select_topk, {dtype}, 1 x 1000000 -> {k}", functions, check=same_indices, seconds=1.0)


@over_models
def test_masked_topk(race: Any, model: Any) -> None:
    scores, mask = attention_like(1, model.tokens), torch.rand(1, model.tokens) < 0.9
    race(
        f"select_topk with a mask, {model.name}, {model.tokens} -> {model.keep}",
        {
            "ours": lambda: tp.select_topk(scores, model.keep, mask=mask),
            "masked_fill + torch.topk + sort": lambda: topk_and_sort(scores.masked_fill(~mask, -torch.inf), model.keep),
        },
        check=same_indices,
        target=("masked_fill + torch.topk + sort", 1.0),
        seconds=0.6,
    )


@over_models
def test_two_tailed(race: Any, model: Any) -> None:
    scores, low = attention_like(1, model.tokens), torch.tensor([model.keep // 10])
    race(
        f"select_two_tailed, {model.name}, {model.tokens} -> {model.keep}",
        {
            "ours": lambda: tp.select_two_tailed(scores, low, model.keep),
            "reference": lambda: tp.reference.select_two_tailed(scores, low, model.keep),
        },
        check=same_indices,
        target=("reference", 2.0),
        seconds=0.6,
    )


@over_models
def test_mixture(race: Any, model: Any) -> None:
    text, visual = attention_like(1, model.tokens), attention_like(1, model.tokens)
    race(
        f"select_mixture, {model.name}, {model.tokens} -> {model.keep}",
        {
            "ours": lambda: tp.select_mixture(text, visual, model.keep),
            "reference": lambda: tp.reference.select_mixture(text, visual, model.keep),
        },
        check=same_indices,
        target=("reference", 2.0),
        seconds=0.6,
    )


def test_mixture_compiled(race: Any) -> None:
    model = MODELS["LLaVA-1.5-7B"]
    text, visual = attention_like(1, model.tokens), attention_like(1, model.tokens)
    compiled = torch.compile(tp.reference.select_mixture)
    race(
        f"select_mixture, {model.name}, against torch.compile",
        {
            "ours": lambda: tp.select_mixture(text, visual, model.keep),
            "reference, torch.compile": lambda: compiled(text, visual, model.keep),
        },
        check=same_indices,
        target=("reference, torch.compile", 1.0),
        seconds=0.6,
    )


@over_models
def test_mask_to_indices(race: Any, model: Any) -> None:
    mask = torch.rand(1, model.tokens) < model.keep / model.tokens
    race(
        f"mask_to_indices, {model.name}, {model.tokens} -> {model.keep}",
        {
            "ours": lambda: tp.mask_to_indices(mask, model.keep),
            "nonzero_static": lambda: (mask.nonzero_static(size=model.keep)[:, 1][None],),
            "reference": lambda: tp.reference.mask_to_indices(mask, model.keep),
        },
        check=same_indices,
        target=("nonzero_static", 1.0),
        seconds=0.6,
    )


@over_models
def test_entropy(race: Any, model: Any) -> None:
    scores = attention_like(1, model.tokens)

    def check(results: dict[str, torch.Tensor]) -> None:
        torch.testing.assert_close(results["ours"], results["reference"])

    race(
        f"score_entropy, {model.name}, {model.tokens}",
        {"ours": lambda: tp.score_entropy(scores), "reference": lambda: tp.reference.score_entropy(scores)},
        check=check,
        target=("reference", 1.0),
        seconds=0.6,
    )


@pytest.mark.parametrize(("frames", "tokens", "keep"), [(5, 576, 64), (32, 196, 40)])
def test_grouped_topk(race: Any, frames: int, tokens: int, keep: int) -> None:
    """The crops of an image, the frames of a video, each with the same budget, so that torch.topk can do it too."""
    n = frames * tokens
    scores = attention_like(1, n)
    groups = torch.arange(frames).repeat_interleave(tokens)[None]
    budgets, k = torch.full((1, frames), keep), frames * keep

    def topk_of_equal_frames() -> tuple[torch.Tensor]:
        of_frame = scores.view(frames, tokens).topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values
        return ((of_frame + torch.arange(0, n, tokens)[:, None]).view(1, -1),)

    def loop_over_frames() -> tuple[torch.Tensor]:
        kept = []
        for g, budget in enumerate(budgets[0].tolist()):
            token = (groups[0] == g).nonzero()[:, 0]
            kept.append(token[scores[0, token].topk(budget).indices])
        return (torch.cat(kept).sort().values[None],)

    race(
        f"select_grouped_topk, {frames} groups of {tokens} -> {keep} each",
        {
            "ours": lambda: tp.select_grouped_topk(scores, groups, budgets, k),
            "loop over groups": loop_over_frames,
            "torch.topk of equal groups": topk_of_equal_frames,
            "reference": lambda: tp.reference.select_grouped_topk(scores, groups, budgets, k),
        },
        check=same_indices,
        target=("loop over groups", 2.0),
        seconds=1.0,
    )
