"""Mistral Small 3.1 and later, LightOnOCR: images of any size by Pixtral, each 2 x 2 patches merged to one token."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..families import WINDOW_LAYERS, WINDOWS, Family, Inputs, Model, Saliency
from ..layout import Layout
from .blocks import block_means, blocks
from .images import grids_of, layout_of_images, sizes_seen, values_of_images
from .towers import attended, attention_in, attention_of, received_attention


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    images = blocks(grids_of(core, inputs), core.config.spatial_merge_size)
    return layout_of_images({core.config.image_token_id: images}, inputs, counts)


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The mean over the patches of a token."""
    grids = grids_of(core, inputs)
    lengths = [height * width for height, width in grids]
    query, key, scale = seen[-1]
    each = received_attention(query, key, scale, lengths).split(lengths)
    values = block_means(each, grids, core.config.spatial_merge_size)
    return values_of_images({core.config.image_token_id: values}, inputs, counts)


_MISTRAL3 = Family(
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
)  # fmt: skip

_LIGHTON_OCR = replace(
    _MISTRAL3, name="LightOnOCR", model_types=("lighton_ocr",),
    grid="a grid per image, of `image_sizes`, after the patch merger",
    saliency=Saliency(
        "mean attention received from the same image in the last layer, per 2 x 2 merge",
        lambda core: attention_in(core.vision_encoder, -1), attended, saliency,
    ),
)  # fmt: skip

FAMILIES = (_MISTRAL3, _LIGHTON_OCR)
