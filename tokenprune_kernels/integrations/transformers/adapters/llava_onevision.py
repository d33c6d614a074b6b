"""LLaVA-OneVision: crops of images as in LLaVA-NeXT, shrunk when they are many, and pooled frames; no class token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import Family, Inputs, Layout, Model, Patches, grid_patches, register_family
from .llava import core_of, decoder_of
from .packing import Pack, packed_pictures, packed_scores
from .pictures import Picture, encoded_with, layout_of_pictures, values_of_pictures
from .towers import TowerSaliency


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
    pictures: dict[int, list[Picture]] = {}
    if pack is not None:
        pictures[core.config.image_token_id] = packed_pictures(core, pack)
    if videos is not None:
        pictures[core.config.video_token_id] = [_video(core, videos[1]) for _ in range(videos[0])]
    return layout_of_pictures(pictures, inputs, counts)


def _video(core: Model, frames: int) -> Picture:
    """The frames on their pooled grids, and one newline, beside the last row of the last frame."""
    vision = core.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    # Frames are squares to the model's code, before and after.
    side = round(core.apply_pooling(torch.zeros(1, patches, 1)).shape[1] ** 0.5)
    parts = [grid_patches(side, side, frame) for frame in range(frames)]
    last = parts[-1]
    positions = torch.cat([last.positions, torch.tensor([[side - 1.0, side]])])
    boxes = torch.cat([last.boxes, torch.tensor([[1.0, 1 - 1 / side, 1.0, 1.0]])])
    return Picture([*parts[:-1], Patches(positions, last.grid, boxes, last.image)])


class PackedSaliency(TowerSaliency):
    """Of each crop and frame, shrunk and pooled like the features; newline tokens have none."""

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        pack, videos = encoded_with(inputs, *WATCHED)
        # Images are encoded first.
        runs = self.seen[-((pack is not None) + (videos is not None)) :]
        values: dict[int, list[Tensor]] = {}
        if pack is not None:
            values[core.config.image_token_id] = packed_scores(core, pack, runs[0])
        if videos is not None:
            pooled = core.apply_pooling(runs[-1].float().unsqueeze(-1)).squeeze(-1)  # [frames, tokens]
            each = pooled.unflatten(0, videos).flatten(1)
            values[core.config.video_token_id] = list(torch.nn.functional.pad(each, (0, 1)))
        return values_of_pictures(values, inputs, counts)


register_family(
    Family(
        name="LLaVA-OneVision",
        core=core_of,
        decoder=decoder_of,
        visual_ids=lambda config: (config.image_token_id, config.video_token_id),
        layout=layout,
        saliency=PackedSaliency,
        watched=WATCHED,
    ),
    "llava_onevision",
)
