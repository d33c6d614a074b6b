"""MiniCPM-V 4.6: images, slices and frames of any size, whose patches are merged 2 x 2 inside of the tower and behind
it; a decoder most of whose layers have linear attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Family, Inputs, Model, Saliency, with_states
from ..layout import Layout
from .blocks import block_means, blocks
from .frames import received
from .images import encoded_with, layout_of_images, values_of_images
from .towers import attention_in

IMAGES, VIDEOS = "get_image_features", "get_video_features"


@dataclass(frozen=True)
class Slices:
    """sizes [slices or frames, 2]: rows and columns of patches. mode: "4x" are merged behind the tower alone."""

    sizes: Tensor
    mode: str | None

    @classmethod
    def seen(cls, arguments: Inputs) -> "Slices":
        sizes = arguments["target_sizes" if "target_sizes" in arguments else "target_sizes_videos"]
        return cls(sizes.detach(), arguments.get("downsample_mode"))

    def merged(self, core: Model) -> int:
        """How many patches along a side the tower itself merges to one."""
        return 1 if (self.mode or core.config.downsample_mode) == "4x" else 2

    def grids(self, part: int = 1) -> list[tuple[int, int]]:
        return [(height // part, width // part) for height, width in self.sizes.tolist()]


def _seen(core: Model, inputs: Inputs) -> dict[int, Slices]:
    """By the id that stands for tokens of images or of frames. Images are encoded first."""
    ids = core.config.image_token_id, core.config.video_token_id
    seen = encoded_with(inputs, IMAGES, VIDEOS)
    return {token: slices for token, slices in zip(ids, seen, strict=True) if slices is not None}


def _behind(core: Model) -> int:
    """How many of what the tower gives are a token, along a side."""
    return int(core.config.merge_kernel_size[0] ** core.config.merger_times)


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Every slice of an image and every frame is a group and an image of its own."""
    images = {
        token: blocks(slices.grids(), slices.merged(core) * _behind(core))
        for token, slices in _seen(core, inputs).items()
    }
    return layout_of_images(images, inputs, counts)


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The mean over what the last layer attends with for a token."""
    grids = {token: slices.grids(slices.merged(core)) for token, slices in _seen(core, inputs).items()}
    lengths = [height * width for each in grids.values() for height, width in each]
    each = iter(torch.cat(seen)[-sum(lengths) :].split(lengths))
    values = {token: block_means([next(each) for _ in of], of, _behind(core)) for token, of in grids.items()}
    return values_of_images(values, inputs, counts)


FAMILIES = (
    Family(
        name="MiniCPM-V 4.6",
        model_types=("minicpmv4_6",),
        layout=layout,
        grid="a grid per slice or frame, of `target_sizes`, `target_sizes_videos`, after both mergers; each an image",
        saliency=Saliency(
            "mean attention received from the same slice in the last layer, its mean over what a token is merged of",
            lambda core: attention_in(core.vision_tower, -1), received, saliency,
        ),
        visual_tokens=("image_token_id", "video_token_id"),
        encoders=(IMAGES, VIDEOS),
        watched={IMAGES: Slices.seen, VIDEOS: Slices.seen},
        **with_states("linear_attention"),
    ),
)  # fmt: skip
