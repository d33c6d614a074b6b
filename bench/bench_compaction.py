"""gather_compact on what a pruned model really keeps, against index_select and torch.gather for each tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp

from .shapes import MODELS, Model


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def kept_tokens(model: Model) -> Tensor:
    return torch.randperm(model.tokens)[: model.keep].sort().values[None]


def index_select(tensors: list[Tensor], indices: Tensor, dims: list[int]) -> list[Tensor]:
    row = indices[0]
    return [t.index_select(d, row) for t, d in zip(tensors, dims, strict=True)]


def gather(tensors: list[Tensor], indices: Tensor, dims: list[int]) -> list[Tensor]:
    """Per tensor, with the index expanded to its shape: what works for any batch size."""
    kept = []
    for t, dim in zip(tensors, dims, strict=True):
        shape = [1] * t.dim()
        shape[0], shape[dim] = indices.shape
        index = indices.view(shape).expand([indices.shape[1] if d == dim else s for d, s in enumerate(t.shape)])
        kept.append(t.gather(dim, index))
    return kept


def functions_for(tensors: list[Tensor], indices: Tensor, dims: list[int]) -> dict[str, Callable[[], list[Tensor]]]:
    return {
        "ours": lambda: tp.gather_compact(tensors, indices, dims=dims),
        "index_select": lambda: index_select(tensors, indices, dims),
        "torch.gather": lambda: gather(tensors, indices, dims),
    }


def same(results: dict[str, list[Tensor]]) -> None:
    for name, result in results.items():
        assert all(torch.equal(got, want) for got, want in zip(result, results["ours"], strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("model", ["LLaVA-1.5-7B", "LLaVA-NeXT-7B"])
def test_hidden_states(race: Any, model: str, dtype: torch.dtype) -> None:
    m = MODELS[model]
    hidden = torch.randn(1, m.tokens, m.hidden).to(dtype)
    race(
        f"hidden {dtype}, {m.name}, {m.tokens} x {m.hidden} -> {m.keep}",
        functions_for([hidden], kept_tokens(m), [1]),
        check=same,
        target=("index_select", 1.0),
        seconds=1.0,
    )


def test_hidden_positions_and_mask(race: Any) -> None:
    m = MODELS["LLaVA-1.5-7B"]
    tensors = [torch.randn(1, m.tokens, m.hidden), torch.arange(m.tokens)[None], torch.ones(1, m.tokens).bool()]
    race(
        f"hidden, positions and mask, {m.name}",
        functions_for(tensors, kept_tokens(m), [1, 1, 1]),
        check=same,
        target=("index_select", 1.0),
        seconds=1.0,
    )


@pytest.mark.parametrize("kind", ["positions", "mask"])
def test_small_tensor_alone(race: Any, kind: str) -> None:
    m = MODELS["LLaVA-1.5-7B"]
    t = torch.arange(m.tokens)[None] if kind == "positions" else torch.ones(1, m.tokens).bool()
    race(
        f"{kind} alone, {m.name}",
        functions_for([t], kept_tokens(m), [1]),
        check=same,
        note="call overhead: the Python function checks its arguments",
        seconds=0.5,
    )


@pytest.mark.parametrize("layout", ["[B,H,T,D]", "view of [B,T,H,D]"])
def test_caches_of_all_layers(race: Any, layout: str) -> None:
    m = MODELS["Qwen2.5-VL-7B@4096"]

    def cache() -> Tensor:
        if layout == "[B,H,T,D]":
            return torch.randn(1, m.key_heads, m.tokens, m.head_dim).bfloat16()
        return torch.randn(1, m.tokens, m.key_heads, m.head_dim).bfloat16().transpose(1, 2)

    caches = [cache() for _ in range(2 * m.layers)]
    race(
        f"{m.layers} layers of KV {layout}, {m.name}, {m.tokens} -> {m.keep}",
        functions_for(caches, kept_tokens(m), [2] * len(caches)),
        check=same,
        target=("index_select", 1.0),
        seconds=3.0,
    )


def test_batch(race: Any) -> None:
    """Different tokens for each sample: index_select has no answer."""
    m, batch = MODELS["LLaVA-1.5-7B"], 8
    hidden = torch.randn(batch, m.tokens, m.hidden).half()
    indices = torch.cat([kept_tokens(m) for _ in range(batch)])
    functions = functions_for([hidden], indices, [1])
    del functions["index_select"]
    functions["advanced indexing"] = lambda: [hidden[torch.arange(batch)[:, None], indices]]
    race(
        f"hidden float16, {m.name}, batch {batch}",
        functions,
        check=same,
        target=("torch.gather", 1.0),
        seconds=1.0,
    )
