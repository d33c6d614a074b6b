"""Gemma 4: images and frames of any size, whose tokens are means of patches; layers may share keys and values."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..families import SHARING_LAYERS, WINDOWS, Family, Inputs, Model, Saliency
from ..layout import Layout, grid_patches
from .images import encoded_with, layout_of_images, values_of_images
from .towers import attended, attention_in, received_attention

IMAGES, VIDEOS = "get_image_features", "get_video_features"


def places_seen(arguments: dict[str, Any]) -> Tensor:
    """[images or frames, patches, 2]: column and row of each patch, -1 for padding."""
    places: Tensor = arguments["image_position_ids" if "image_position_ids" in arguments else "video_position_ids"]
    return places.detach().flatten(0, -3)  # [videos, frames, patches, 2] until transformers 5.20 or so


def _places(core: Model, inputs: Inputs) -> list[tuple[int, Tensor]]:
    """The id that stands for tokens of images or of videos, and the places seen of each."""
    images, videos = encoded_with(inputs, IMAGES, VIDEOS)
    ids = (core.config.image_token_id, core.config.video_token_id)
    return [(kind, seen) for kind, seen in zip(ids, (images, videos), strict=True) if seen is not None]


def _kernel(core: Model) -> int:
    """How many patches along a side are a token; without a tower, pixels are projected to tokens."""
    return int(core.config.vision_config.pooling_kernel_size) if hasattr(core, "vision_tower") else 1


def _grids(core: Model, places: Tensor) -> list[tuple[int, int]]:
    """Height and width of each image or frame, in tokens."""
    size = (places.amax(1) + 1) // _kernel(core)
    return [(height, width) for width, height in size.tolist()]


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Every image and every frame of a video is a group and an image of its own."""
    images = {
        kind: [[grid_patches(height, width, 0)] for height, width in _grids(core, places)]
        for kind, places in _places(core, inputs)
    }
    return layout_of_images(images, inputs, counts)


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The mean over the patches of a token. Images are encoded first, then videos."""
    given = _places(core, inputs)
    values = {
        kind: [_scores(core, scale, *image) for image in zip(query, key, places, _grids(core, places), strict=True)]
        for (kind, places), (query, key, scale) in zip(given, seen[-len(given) :], strict=True)
    }
    return values_of_images(values, inputs, counts)


def _scores(core: Model, scale: float, query: Tensor, key: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """[tokens] of one image, whose queries and keys are [H, patches, D] with padding behind them."""
    kernel = _kernel(core)
    real = (places >= 0).all(1).nonzero().squeeze(1)
    query, key = query[:, real].unsqueeze(0), key[:, real].unsqueeze(0)
    received = received_attention(query, key, scale, [len(real)])
    column, row = (places[real] // kernel).unbind(1)
    # A product, as in the model's pooling: sums by index would depend on the order of atomics.
    token = torch.nn.functional.one_hot(row * grid[1] + column, grid[0] * grid[1]).to(received)
    pooled: Tensor = received @ token / kernel**2
    return pooled


_GEMMA4 = Family(
    name="Gemma 4",
    model_types=("gemma4",),
    layout=layout,
    grid="a grid per image or frame, of `image_position_ids`, `video_position_ids`, after the pooling",
    saliency=Saliency(
        "mean attention received in the last layer, averaged like the features",
        lambda core: attention_in(core.vision_tower, -1), attended, saliency,
    ),
    visual_tokens=("image_token_id", "video_token_id"),
    encoders=(IMAGES, VIDEOS),
    watched={IMAGES: places_seen, VIDEOS: places_seen},
    layer_inputs=("per_layer_input",),
    layer_types=WINDOWS,
    cache_layers=SHARING_LAYERS,
)  # fmt: skip

_UNIFIED = replace(
    _GEMMA4, name="Gemma 4 without a tower", model_types=("gemma4_unified",), saliency=None,
    grid="a grid per image or frame, of `image_position_ids`, `video_position_ids`",
)  # fmt: skip

FAMILIES = (_GEMMA4, _UNIFIED)
