"""What is timed: five steps of pruning at the sizes of LLaVA-1.5-7B, ours and what they replace."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import methods, reference
from .._backend import use_backend
from ..ops import cross_attention_scores, gather_compact, repulsion_sample, spatial_semantic_nms
from . import loops
from .images import image, make_features
from .shapes import MODELS, Model

Result = Tensor | list[Tensor]
LLAVA = MODELS["LLaVA-1.5-7B"]


class Pair(NamedTuple):
    """Two functions that give the same. picks: token indices, of which near ties may change some; else values."""

    ours: Callable[[], Result]
    replaced: Callable[[], Result]
    picks: bool


class Row(NamedTuple):
    name: str
    sizes: str
    against: str
    op: str  # whose backend is told
    make: Callable[[torch.device], Pair]


def _drawn(device: torch.device, seed: int, *shape: int) -> Tensor:
    """The same numbers on every machine; of 16 bits on a GPU, as models have them there."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, torch.float32 if device.type == "cpu" else torch.float16)


def _attention(model: Model, device: torch.device) -> tuple[Tensor, Tensor]:
    query = _drawn(device, 0, 1, model.query_heads, model.question, model.head_dim)
    return query, _drawn(device, 1, 1, model.key_heads, model.tokens, model.head_dim)


def _features(model: Model, width: int, device: torch.device) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = make_features("image", model, width)
    return features.to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def rows(model: Model = LLAVA) -> list[Row]:
    n, k, few = model.tokens, model.keep, model.tokens // 10

    def scores(device: torch.device) -> Pair:
        query, key = _attention(model, device)
        return Pair(
            lambda: cross_attention_scores(query, key)[0], lambda: reference.cross_attention_scores(query, key)[0],
            picks=False,
        )  # fmt: skip

    def diversity(device: torch.device) -> Pair:
        features = _features(model, model.vision_hidden, device)
        return Pair(lambda: repulsion_sample(features, k)[0], lambda: loops.max_min(features, k), picks=True)

    def suppression(device: torch.device) -> Pair:
        with torch.random.fork_rng(devices=[]):
            drawn = image(model, torch.float32 if device.type == "cpu" else torch.bfloat16, patch=4)
        values, features, positions, _ = (t.to(device) for t in drawn)
        return Pair(
            lambda: spatial_semantic_nms(values, features, positions, few)[0],
            lambda: loops.nms(values[0], features[0], positions[0], few), picks=True,
        )  # fmt: skip

    def caches(device: torch.device) -> Pair:
        draw = torch.Generator().manual_seed(0)
        kept = torch.randperm(n, generator=draw)[:k].sort().values.to(device)
        drawn = _drawn(device, 2, 1, model.key_heads, n, model.head_dim).to(torch.bfloat16)
        held = [drawn + layer for layer in range(2 * model.layers)]
        return Pair(
            lambda: gather_compact(held, kept.unsqueeze(0), dims=[2] * len(held)),
            lambda: [t.index_select(2, kept) for t in held], picks=False,
        )  # fmt: skip

    def method(device: torch.device) -> Pair:
        query, key = _attention(model, device)
        features = _features(model, model.hidden, device)

        def ours() -> Tensor:
            return methods.coast(query, key, features, k, causal=False).indices

        def eager() -> Tensor:
            with use_backend("reference"):
                return ours()

        return Pair(ours, eager, picks=True)

    heads = f"{model.query_heads} heads"
    return [
        Row("attention scores", f"{model.question} x {n}, {heads}", "eager PyTorch", "cross_attention_scores", scores),
        Row("max-min diversity", f"{n} -> {k}", "published loop", "repulsion_sample", diversity),
        Row("suppression (NMS)", f"{n} -> {few}", "published loop", "spatial_semantic_nms", suppression),
        Row("KV cache", f"{model.layers} layers, {n} -> {k}", "index_select of each", "gather_compact", caches),
        Row("COAST, whole method", f"{n} -> {k}", "eager PyTorch", "cross_attention_scores", method),
    ]
