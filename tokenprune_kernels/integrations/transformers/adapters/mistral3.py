"""Mistral Small 3.1 and later: images of any size by Pixtral, each 2 x 2 patches merged to one token."""

from typing import Any

import torch
from torch import Tensor

from ..families import WINDOW_LAYERS, WINDOWS, Family, Inputs, Model, Saliency
from ..layout import Layout, Patches, grid_patches
from .images import grids_of, layout_of_images, sizes_seen, values_of_images
from .towers import attended, attention_of, received_attention


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    merge = core.config.spatial_merge_size
    images = [[_merged(height, width, merge)] for height, width in grids_of(core, inputs)]
    return layout_of_images({core.config.image_token_id: images}, inputs, counts)


def _merged(height: int, width: int, merge: int) -> Patches:
    """The last row or column of patches is left out where it has no partner."""
    rows, columns = height // merge, width // merge
    return grid_patches(rows, columns, 0, (0.0, 0.0, columns * merge / width, rows * merge / height))


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The mean over the patches of a token."""
    grids = grids_of(core, inputs)
    lengths = [height * width for height, width in grids]
    query, key, scale = seen[-1]
    each = received_attention(query, key, scale, lengths).split(lengths)
    values = [_pooled(v.view(grid), core.config.spatial_merge_size) for v, grid in zip(each, grids, strict=True)]
    return values_of_images({core.config.image_token_id: values}, inputs, counts)


def _pooled(patches: Tensor, merge: int) -> Tensor:
    pooled: Tensor = torch.nn.functional.avg_pool2d(patches[None].float(), merge)
    return pooled.flatten()


FAMILIES = (
    Family(
        name="Mistral 3",
        model_types=("mistral3",),
        layout=layout,
        grid="a grid per image, of `image_sizes`, after the patch merger; break and end tokens are text",
        saliency=Saliency(
            "mean attention received from the same image in layer `vision_feature_layer`, per 2 x 2 merge",
            attention_of, attended, saliency,
        ),
        watched={"get_image_features": sizes_seen},
        layer_types=WINDOWS,
        cache_layers=WINDOW_LAYERS,
    ),
)  # fmt: skip
