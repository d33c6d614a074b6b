"""Perception LM: tiles of an image or frames, all of one size, whose patches are pooled; its tower is one of timm,
whose attention is not read."""

from ..families import Family, Inputs, Model
from ..layout import Layout
from .images import equal_grids


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Each tile and each frame is a group and an image of its own."""
    rows, columns = core.vision_tower.timm_model.patch_embed.grid_size
    ratio = core.config.projector_pooling_ratio
    return equal_grids(counts, rows // ratio, columns // ratio)


FAMILIES = (
    Family(
        name="Perception LM",
        model_types=("perception_lm",),
        layout=layout,
        grid="a grid per tile or frame, of the tower's patches, pooled; each is an image",
        saliency=None,
        visual_tokens=("image_token_id", "video_token_id"),
    ),
)
