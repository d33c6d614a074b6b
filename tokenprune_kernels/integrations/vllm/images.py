"""The engine's side of an image: what its encoder made loses the tokens that the method drops."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transformers.adapters.towers import patch_scores
from ..transformers.layout import Layout, Patches, layout_of
from .choice import Chooser, Images
from .setting import current

Seen = list[tuple[Tensor, Tensor, float]]  # query and key [N, H, L, D] of the probed attention, and its scale


def chooser_of(vllm_config: Any) -> Chooser:
    """The setting, for an engine of this configuration."""
    chooser = Chooser(current())
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if chooser.reads_saliency and ranks > 1:
        raise NotImplementedError(
            f"tokenprune_kernels: {chooser.setting.method} reads the attention of all heads of the vision tower, which "
            f"are on {ranks} ranks; run with --tensor-parallel-size 1"
        )
    return chooser


class Kept(NamedTuple):
    """indices [K]: the kept tokens of an image, ascending. rows [K, C]: what takes their places."""

    indices: Tensor
    rows: Tensor


def prune_images(
    choose: Chooser,
    features: Tensor | Sequence[Tensor],
    layouts: Callable[[], Sequence[Sequence[Patches]]],
    saliencies: Callable[[], Sequence[Tensor]],
) -> list[Kept]:
    """What stays of each image.

    features: [B, V, C], or [V, C] of each image. layouts, saliencies: of each image, where its tokens lie, and [V].
    """
    layouts, saliencies = functools.cache(layouts), functools.cache(saliencies)
    together = isinstance(features, Tensor) and not choose.one_by_one
    parts = [slice(0, len(features))] if together else [slice(i, i + 1) for i in range(len(features))]
    kept: list[Kept] = []
    for part in parts:
        of_part = features[part] if isinstance(features, Tensor) else features[part.start].unsqueeze(0)
        indices, rows = choose(
            Images(
                of_part,
                functools.partial(_layout, layouts, part, of_part),
                functools.partial(_saliency, saliencies, part, of_part),
            )
        )
        kept += map(Kept, indices, rows)
    return kept


def _layout(layouts: Callable[[], Sequence[Sequence[Patches]]], part: slice, features: Tensor) -> Layout:
    made = layout_of(layouts()[part], features.shape[1])
    return Layout(*(t.to(features.device, non_blocking=True) for t in vars(made).values()))


def _saliency(saliencies: Callable[[], Sequence[Tensor]], part: slice, features: Tensor) -> Tensor:
    return torch.stack(list(saliencies()[part])).float().to(features.device)


def tower_attention(model: Any) -> Any:
    """The attention of the layer whose features a LLaVA takes: the engine's tower ends there."""
    layers = getattr(getattr(getattr(model.vision_tower, "vision_model", None), "encoder", None), "layers", None)
    taken = model.config.vision_feature_layer
    module = getattr(getattr(layers[-1], "self_attn", None), "attn", None) if layers else None
    if module is None or not isinstance(taken, int):
        raise NotImplementedError(
            "tokenprune_kernels: the saliency needs a vision tower of one feature layer whose last layer has "
            f"self_attn.attn, got {type(model.vision_tower).__name__} and vision_feature_layer {taken!r}"
        )
    return module


@contextmanager
def watched(attention: Any, seen: Seen) -> Iterator[None]:
    """Inside the block, what the attention is called with is written down."""

    def see(module: Any, arguments: tuple[Any, ...]) -> None:
        query, key = arguments[:2]
        heads = module.num_heads
        seen.append((*(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key)), module.scale))

    hook = attention.register_forward_pre_hook(see)
    try:
        yield
    finally:
        hook.remove()


def tower_scores(model: Any, seen: Seen) -> Tensor:
    """[crops or images, tokens that the model takes of each], from what was seen of their encoding."""
    return torch.cat([patch_scores(model, query, key, scale) for query, key, scale in seen])
