"""LFM2-VL: images and tiles of any size by SigLIP 2, each 2 x 2 patches made a token, in front of a decoder with
convolutions in most of its layers."""

from typing import Any

from torch import Tensor

from ..families import Family, Inputs, Model, Saliency, with_states
from ..layout import Layout
from .blocks import Grid, block_means, blocks
from .images import encoded_with, layout_of_images, values_of_images
from .towers import attended, attention_in, received_attention


def grids_seen(arguments: Inputs) -> Tensor:
    """[images, 2]: rows and columns of patches."""
    shapes: Tensor = arguments["spatial_shapes"]
    return shapes.detach()


def _grids(inputs: Inputs) -> list[Grid]:
    (seen,) = encoded_with(inputs, "get_image_features")
    return [(height, width) for height, width in seen.tolist()]


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Each tile is a group and an image of its own."""
    images = blocks(_grids(inputs), core.config.downsample_factor)
    return layout_of_images({core.config.image_token_id: images}, inputs, counts)


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The mean over the patches of a token. The tower pads images behind their patches."""
    query, key, scale = seen[-1]
    grids = _grids(inputs)
    lengths = [height * width for height, width in grids]
    each = [
        received_attention(q[None, :, :length], k[None, :, :length], scale, [length])
        for q, k, length in zip(query, key, lengths, strict=True)
    ]
    values = block_means(each, grids, core.config.downsample_factor)
    return values_of_images({core.config.image_token_id: values}, inputs, counts)


FAMILIES = (
    Family(
        name="LFM2-VL",
        model_types=("lfm2_vl",),
        layout=layout,
        grid="a grid per image, of `spatial_shapes`, after the pixel shuffle; each tile is an image",
        saliency=Saliency(
            "mean attention received in the last layer, its mean over the patches of a token",
            lambda core: attention_in(core.vision_tower, -1), attended, saliency,
        ),
        watched={"get_image_features": grids_seen},
        normed=lambda layer, hidden: layer.operator_norm(hidden),
        **with_states("conv"),
    ),
)  # fmt: skip
