"""Gemma 4: images and frames of any size, whose tokens are means of patches; layers may share keys and values."""

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from ..families import WINDOW_LAYERS, WINDOWS, Family, Inputs, Model, Saliency
from ..layout import Layout, grid_patches
from .images import encoded_with, layout_of_images, values_of_images
from .towers import attended, attention_in, received_attention

IMAGES, VIDEOS = "get_image_features", "get_video_features"


def places_seen(arguments: dict[str, Any]) -> Tensor:
    """[images or frames, patches, 2]: column and row of each patch, -1 for padding."""
    places: Tensor = arguments["image_position_ids" if "image_position_ids" in arguments else "video_position_ids"]
    return places.detach()


def _places(core: Model, inputs: Inputs) -> list[tuple[int, Tensor]]:
    """The id that stands for tokens of images or of videos, and the places seen of each."""
    images, videos = encoded_with(inputs, IMAGES, VIDEOS)
    ids = (core.config.image_token_id, core.config.video_token_id)
    return [(kind, seen) for kind, seen in zip(ids, (images, videos), strict=True) if seen is not None]


def _grids(core: Model, places: Tensor) -> list[tuple[int, int]]:
    """Height and width of each image or frame, in tokens."""
    size = (places.amax(1) + 1) // core.config.vision_config.pooling_kernel_size
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
    kernel = core.config.vision_config.pooling_kernel_size
    real = (places >= 0).all(1).nonzero().squeeze(1)
    query, key = query[:, real].unsqueeze(0), key[:, real].unsqueeze(0)
    received = received_attention(query, key, scale, [len(real)])
    column, row = (places[real] // kernel).unbind(1)
    # A product, as in the model's pooling: sums by index would depend on the order of atomics.
    token = torch.nn.functional.one_hot(row * grid[1] + column, grid[0] * grid[1]).to(received)
    pooled: Tensor = received @ token / kernel**2
    return pooled


FAMILIES = (
    Family(
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
        # Layers that reuse keys and values of others have none of their own.
        cache_layers=(*WINDOW_LAYERS, getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer)),
    ),
)  # fmt: skip
