"""LLaVA-NeXT: a thumbnail and crops of each image, unpadded, with newline tokens; a CLIP tower, or SigLIP."""

from typing import Any

from torch import Tensor

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout
from .images import encoded_with, layout_of_images, values_of_images
from .packing import Pack, packed_images, packed_scores
from .towers import attention_of, patch_scores


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    (pack,) = encoded_with(inputs, "pack_image_features")
    return layout_of_images({core.config.image_token_id: packed_images(core, pack)}, inputs, counts)


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The scores of each crop, packed as the crops are; newline tokens have none."""
    (pack,) = encoded_with(inputs, "pack_image_features")
    return values_of_images({core.config.image_token_id: packed_scores(core, pack, seen[-1])}, inputs, counts)


FAMILIES = (
    Family(
        name="LLaVA-NeXT",
        model_types=("llava_next",),
        layout=layout,
        grid="a thumbnail and crops in the order of the model's own `pack_image_features`; newline tokens see nothing",
        saliency=Saliency(
            "class token's row of each crop, packed alike; SigLIP (Granite Vision): mean attention received",
            attention_of, patch_scores, saliency,
        ),
        watched={"pack_image_features": Pack.seen},
    ),
)  # fmt: skip
