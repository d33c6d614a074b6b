"""LLaVA-OneVision: crops of images as in LLaVA-NeXT, shrunk when they are many, and pooled frames; no class token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..families import Family, Inputs, Model, Saliency
from ..layout import Patches, grid_patches
from .packing import Pack, packed_images, packed_scores
from .towers import attention_of, patch_scores
from .videos import frames_seen, layout, saliency

WATCHED: dict[str, Callable[[Inputs], Any]] = {
    "pack_image_features": Pack.seen, "get_video_features": frames_seen,
}  # fmt: skip


def video(core: Model, frames: int) -> list[Patches]:
    """The frames on their pooled grids, and one newline, beside the last row of the last frame."""
    vision = core.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    # Frames are squares to the model's code, before and after.
    side = round(core.apply_pooling(torch.zeros(1, patches, 1)).shape[1] ** 0.5)
    *first, last = [grid_patches(side, side, frame) for frame in range(frames)]
    positions = torch.cat([last.positions, torch.tensor([[side - 1.0, side]])])
    boxes = torch.cat([last.boxes, torch.tensor([[1.0, 1 - 1 / side, 1.0, 1.0]])])
    return [*first, Patches(positions, last.grid, boxes, last.image)]


def video_scores(core: Model, scores: Tensor) -> Tensor:
    """Pooled like the features; the newline has none."""
    pooled: Tensor = core.apply_pooling(scores.float().unsqueeze(-1))
    return torch.nn.functional.pad(pooled.flatten(), (0, 1))


FAMILIES = (
    Family(
        name="LLaVA-OneVision",
        model_types=("llava_onevision",),
        layout=partial(layout, watched=WATCHED, images=packed_images, video=video),
        grid="a thumbnail and crops, shrunk when they are many; frames pooled, a group each",
        saliency=Saliency(
            "mean attention received in layer `vision_feature_layer`, packed or pooled alike",
            attention_of, patch_scores,
            partial(saliency, watched=WATCHED, images=packed_scores, video=video_scores),
        ),
        visual_tokens=("image_token_id", "video_token_id"),
        encoders=("get_image_features", "get_video_features"),
        watched=WATCHED,
    ),
)  # fmt: skip
