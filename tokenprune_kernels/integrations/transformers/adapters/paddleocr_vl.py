"""PaddleOCR-VL: images of any size, each 2 x 2 patches merged to one token, in front of ERNIE 4.5 with mRoPE."""

from typing import Any

import torch
from torch import Tensor

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout
from .blocks import Grid, block_means, blocks
from .frames import received
from .images import encoded_with, layout_of_images, values_of_images
from .towers import attention_in


def grids_seen(arguments: Inputs) -> Tensor:
    """[images, 3]: frames, of which an image has one, and rows and columns of patches."""
    grids: Tensor = arguments["image_grid_thw"]
    return grids.detach()


def _grids(inputs: Inputs) -> list[Grid]:
    (seen,) = encoded_with(inputs, "get_image_features")
    return [(height, width) for frames, height, width in seen.tolist() for _ in range(frames)]


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    images = blocks(_grids(inputs), core.config.vision_config.spatial_merge_size)
    return layout_of_images({core.config.image_token_id: images}, inputs, counts)


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The mean over the patches of a token."""
    grids = _grids(inputs)
    lengths = [height * width for height, width in grids]
    each = torch.cat(seen)[-sum(lengths) :].split(lengths)
    values = block_means(each, grids, core.config.vision_config.spatial_merge_size)
    return values_of_images({core.config.image_token_id: values}, inputs, counts)


FAMILIES = (
    Family(
        name="PaddleOCR-VL",
        model_types=("paddleocr_vl",),
        layout=layout,
        grid="the merged grid of `image_grid_thw`",
        saliency=Saliency(
            "mean attention received from the same image in the last layer, per 2 x 2 merge",
            lambda core: attention_in(core.visual, -1), received, saliency,
        ),
        watched={"get_image_features": grids_seen},
        mrope=True,
    ),
)  # fmt: skip
