"""Images beside videos, whose frames the tower sees as it sees images (LLaVA-OneVision, LLaVA-NeXT-Video, Video-LLaVA).

Every frame is a group and an image of its own.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..families import Inputs, Model
from ..layout import Layout, Patches
from .images import encoded_with, layout_of_images, values_of_images


def frames_seen(arguments: Inputs) -> tuple[int, int]:
    """Videos and frames of each."""
    # In transformers 5.3 and thereabouts the pixels of a video were called those of an image.
    pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    assert pixels is not None
    return int(pixels.shape[0]), int(pixels.shape[1])


def layout(
    core: Model, inputs: Inputs, counts: list[int], *,
    watched: Iterable[str],
    images: Callable[[Model, Any], list[list[Patches]]],
    video: Callable[[Model, int], list[Patches]],
) -> Layout:  # fmt: skip
    """watched: the method that shows the images, and the one that shows the videos.

    images(core, what was seen) -> the parts of each image. video(core, frames) -> the parts of a video.
    """
    seen, videos = encoded_with(inputs, *watched)
    parts: dict[int, list[list[Patches]]] = {}
    if seen is not None:
        parts[core.config.image_token_id] = images(core, seen)
    if videos is not None:
        count, frames = videos
        parts[core.config.video_token_id] = [video(core, frames)] * count
    return layout_of_images(parts, inputs, counts)


def saliency(
    core: Model, inputs: Inputs, counts: list[int], runs: list[Tensor], *,
    watched: Iterable[str],
    images: Callable[[Model, Any, Tensor], list[Tensor]],
    video: Callable[[Model, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """runs: [images, crops or frames, patches] of each run of the tower.

    images(core, what was seen, its run) -> a value per token of each image. video(core, [frames, patches]) -> a value
    per token of a video.
    """
    seen, videos = encoded_with(inputs, *watched)
    runs = runs[-((seen is not None) + (videos is not None)) :]  # images are encoded first
    values: dict[int, list[Tensor]] = {}
    if seen is not None:
        values[core.config.image_token_id] = images(core, seen, runs[0])
    if videos is not None:
        values[core.config.video_token_id] = [video(core, frames) for frames in runs[-1].chunk(videos[0])]
    return values_of_images(values, inputs, counts)
