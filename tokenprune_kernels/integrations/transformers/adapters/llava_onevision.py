"""LLaVA-OneVision: crops of images as in LLaVA-NeXT, shrunk when they are many, and pooled frames; no class token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout, Patches, grid_patches
from .images import encoded_with, layout_of_images, values_of_images
from .packing import Pack, packed_images, packed_scores
from .towers import attention_of, patch_scores


def frames_seen(arguments: dict[str, Any]) -> tuple[int, int]:
    """Videos and frames of each."""
    # In transformers 5.3 and thereabouts the pixels of a video were called those of an image.
    pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    assert pixels is not None
    return int(pixels.shape[0]), int(pixels.shape[1])


WATCHED: dict[str, Callable[[Inputs], Any]] = {
    "pack_image_features": Pack.seen, "get_video_features": frames_seen,
}  # fmt: skip


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Every crop and every frame is a group of its own."""
    pack, videos = encoded_with(inputs, *WATCHED)
    images: dict[int, list[list[Patches]]] = {}
    if pack is not None:
        images[core.config.image_token_id] = packed_images(core, pack)
    if videos is not None:
        images[core.config.video_token_id] = [_video(core, videos[1]) for _ in range(videos[0])]
    return layout_of_images(images, inputs, counts)


def _video(core: Model, frames: int) -> list[Patches]:
    """The frames on their pooled grids, and one newline, beside the last row of the last frame."""
    vision = core.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    # Frames are squares to the model's code, before and after.
    side = round(core.apply_pooling(torch.zeros(1, patches, 1)).shape[1] ** 0.5)
    *first, last = [grid_patches(side, side, frame) for frame in range(frames)]
    positions = torch.cat([last.positions, torch.tensor([[side - 1.0, side]])])
    boxes = torch.cat([last.boxes, torch.tensor([[1.0, 1 - 1 / side, 1.0, 1.0]])])
    return [*first, Patches(positions, last.grid, boxes, last.image)]


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The scores of each crop and frame, shrunk and pooled like the features; newline tokens have none."""
    pack, videos = encoded_with(inputs, *WATCHED)
    runs = seen[-((pack is not None) + (videos is not None)) :]  # images are encoded first
    values: dict[int, list[Tensor]] = {}
    if pack is not None:
        values[core.config.image_token_id] = packed_scores(core, pack, runs[0])
    if videos is not None:
        pooled = core.apply_pooling(runs[-1].float().unsqueeze(-1)).squeeze(-1)  # [frames, tokens]
        each = pooled.unflatten(0, videos).flatten(1)
        values[core.config.video_token_id] = list(torch.nn.functional.pad(each, (0, 1)))
    return values_of_images(values, inputs, counts)


FAMILIES = (
    Family(
        name="LLaVA-OneVision",
        model_types=("llava_onevision",),
        layout=layout,
        grid="a thumbnail and crops, shrunk when they are many; frames pooled, a group each",
        saliency=Saliency(
            "mean attention received in layer `vision_feature_layer`, packed or pooled alike",
            attention_of, patch_scores, saliency,
        ),
        visual_tokens=("image_token_id", "video_token_id"),
        encoders=("get_image_features", "get_video_features"),
        watched=WATCHED,
    ),
)  # fmt: skip
