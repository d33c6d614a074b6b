"""Llama 4: tiles of an image and a thumbnail, each pixel-shuffled; attention in chunks of the prompt in most layers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..attention import base_of
from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout
from .images import by_sample, equal_grids
from .towers import mean_attention, window_means


def _side(core: Model) -> int:
    """Patches along a side of a tile; tiles have one size."""
    vision = core.config.vision_config
    return int(vision.image_size // vision.patch_size)


def _block(core: Model) -> int:
    """Patches along a side of a token."""
    ratio: float = core.config.vision_config.pixel_shuffle_ratio
    return round(1 / ratio)


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Each tile is a group and an image of its own: how the processor has cut an image is not told."""
    side = _side(core) // _block(core)
    return equal_grids(counts, side, side)


def attention_of(core: Model) -> nn.Module:
    if base_of(core.vision_model.config._attn_implementation) == "eager":
        raise NotImplementedError("a vision tower with sdpa: Llama 4 keeps its eager attention under a name of its own")
    attention: nn.Module = core.vision_model.model.layers[-1].self_attn
    return attention


def class_scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """[tokens]: the attention of the class token, which is the last, averaged over the patches of a token."""
    return window_means(mean_attention(query[:, :, -1:], key, scale)[:, :-1], _side(core), _block(core)).flatten()


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    return by_sample(torch.cat(seen), counts)


def counted_to(config: Any) -> int | None:
    """Layers without rotation scale their queries by the number of tokens in their cache, from so many on."""
    return int(config.floor_scale) if config.attn_temperature_tuning and not all(config.no_rope_layers) else None


FAMILIES = (
    Family(
        name="Llama 4",
        model_types=("llama4",),
        layout=layout,
        grid="a grid per tile, after the pixel shuffle; each tile is an image",
        saliency=Saliency(
            "class token's row in the last layer, mean of each 2 x 2 block", attention_of, class_scores, saliency
        ),
        layer_types=frozenset({"full_attention", "chunked_attention"}),
        cache_layers=(DynamicLayer, DynamicSlidingWindowLayer),
        counted_to=counted_to,
    ),
)  # fmt: skip
