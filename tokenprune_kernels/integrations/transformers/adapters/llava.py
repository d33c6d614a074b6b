"""LLaVA-1.5 and VipLLaVA: a grid of patches per image.

The tower is CLIP or SigLIP, for images of one size, or Pixtral, for any.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout
from .images import grid_layout, grids_of, sizes_seen, values_of_images
from .towers import attended, attention_in, attention_of, check_grid, patch_scores, received_attention


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    check_grid(core)
    return grid_layout(core, inputs, counts)


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    grids = grids_of(core, inputs)
    query, key, scale = seen[-1]
    if len(query) == len(grids):
        values = list(patch_scores(core, query, key, scale))
    else:  # Pixtral: the images are one sequence, and see only themselves
        lengths = [height * width for height, width in grids]
        values = list(received_attention(query, key, scale, lengths).split(lengths))
    return values_of_images({core.config.image_token_id: values}, inputs, counts)


_LLAVA = Family(
    name="LLaVA-1.5",
    model_types=("llava",),
    layout=layout,
    grid="a grid per image, from the size of what the tower was given (`image_sizes` with Pixtral)",
    saliency=Saliency(
        "class token's row, layer `vision_feature_layer`; SigLIP, Pixtral: mean attention received from the same "
        "image",
        attention_of, attended, saliency,
    ),
    watched={"get_image_features": sizes_seen},
)  # fmt: skip


def deepest(core: Model) -> nn.Module:
    return attention_in(core.vision_tower, core.config.vision_feature_layers)


# Its features are those of several layers.
_VIPLLAVA = replace(
    _LLAVA, name="VipLLaVA", model_types=("vipllava",), grid="a grid per image",
    saliency=Saliency("class token's row, the deepest of `vision_feature_layers`", deepest, attended, saliency),
)  # fmt: skip

FAMILIES = (_LLAVA, _VIPLLAVA)
