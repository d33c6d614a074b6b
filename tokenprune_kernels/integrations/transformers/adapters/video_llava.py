"""Video-LLaVA: a tower for images and one for frames, of one size; of a frame the class token is a visual token too."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, Inputs, Model, Saliency
from ..layout import Patches, grid_patches
from .towers import attention_in, check_grid, cut_in_front, has_class_token, tower_scores
from .videos import frames_seen, layout, saliency


def images_seen(arguments: Inputs) -> int:
    """How many."""
    pixels = arguments.get("pixel_values")
    return len(arguments["pixel_values_images"] if pixels is None else pixels)  # the name until transformers 5.12 or so


WATCHED: dict[str, Callable[[Inputs], Any]] = {
    "get_image_features": images_seen, "get_video_features": frames_seen,
}  # fmt: skip


def _grid(core: Model, image: int) -> Patches:
    vision = core.config.vision_config
    side = vision.image_size // vision.patch_size
    return grid_patches(side, side, image)


def images(core: Model, count: int) -> list[list[Patches]]:
    check_grid(core)
    return [[_grid(core, 0)]] * count


def video(core: Model, frames: int) -> list[Patches]:
    """A class token is in front of the patches of its frame, on no grid (NaN), and sees no part of it."""
    parts = [_grid(core, frame) for frame in range(frames)]
    if not has_class_token(core):
        return parts
    beside, none = torch.full((1, 2), torch.nan), torch.zeros(1, 4)
    return [
        replace(part, positions=torch.cat([beside, part.positions]), boxes=torch.cat([none, part.boxes]))
        for part in parts
    ]


def image_scores(core: Model, count: int, scores: Tensor) -> list[Tensor]:
    return list(scores[:, cut_in_front(core) :])


def video_scores(core: Model, scores: Tensor) -> Tensor:
    return scores.flatten()


def attentions(core: Model) -> tuple[nn.Module, nn.Module]:
    layer = core.config.vision_feature_layer
    return attention_in(core.image_tower, layer), attention_in(core.video_tower, layer)


FAMILIES = (
    Family(
        name="Video-LLaVA",
        model_types=("video_llava",),
        layout=partial(layout, watched=WATCHED, images=images, video=video),
        grid="a grid per image and per frame, a group each; a frame's class token is in its group and on no grid",
        saliency=Saliency(
            "class token's row, layer `vision_feature_layer`, its own entry for a frame's class token",
            attentions, tower_scores,
            partial(saliency, watched=WATCHED, images=image_scores, video=video_scores),
        ),
        visual_tokens=("image_token_id", "video_token_id"),
        encoders=("get_image_features", "get_video_features"),
        watched=WATCHED,
    ),
)  # fmt: skip
