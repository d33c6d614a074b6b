"""VideoLLaMA 3: images and frames of any size, merged behind the tower; of a video, the processor leaves tokens out of
the prompt that change little from frame to frame."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout, Patches, grid_patches
from .frames import received
from .images import encoded_with, layout_of_images, values_of_images
from .towers import attention_in

IMAGES, VIDEOS = "get_image_features", "get_video_features"
COMPRESSION = "video_compression_mask"


@dataclass(frozen=True)
class Grids:
    """grids [images or videos, 3]: frames, and rows and columns of patches. sides [images or videos]: how many patches
    along a side are a token."""

    grids: Tensor
    sides: Tensor

    @classmethod
    def seen(cls, arguments: Inputs) -> "Grids":
        kind = "video" if "video_grid_thw" in arguments else "image"
        return cls(arguments[f"{kind}_grid_thw"].detach(), arguments[f"{kind}_merge_sizes"].detach())

    def each(self) -> list[tuple[int, int, int, int]]:
        """Frames, rows and columns of tokens, and the patches of each token."""
        merged = zip(self.grids.tolist(), self.sides.tolist(), strict=True)
        return [(frames, height // side, width // side, side**2) for (frames, height, width), side in merged]


def _seen(core: Model, inputs: Inputs) -> dict[int, list[tuple[int, int, int, int]]]:
    """By the id that stands for tokens of images or of videos. Images are encoded first."""
    ids = core.config.image_token_id, core.config.video_token_id
    seen = encoded_with(inputs, IMAGES, VIDEOS)
    return {token: grids.each() for token, grids in zip(ids, seen, strict=True) if grids is not None}


def _in_prompt(core: Model, inputs: Inputs, token: int, lengths: list[int]) -> list[Tensor]:
    """[tokens] bool for each image or video: which of its tokens the processor has put into the prompt."""
    mask = inputs.get(COMPRESSION) if token == core.config.video_token_id else None
    whole = torch.ones(sum(lengths), dtype=torch.bool) if mask is None else mask.bool().cpu()
    return list(whole.split(lengths))


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Every image and every frame of a video is a group and an image of its own."""
    images: dict[int, list[list[Patches]]] = {}
    for token, each in _seen(core, inputs).items():
        stays = _in_prompt(core, inputs, token, [frames * rows * columns for frames, rows, columns, _ in each])
        images[token] = [
            [_left(grid_patches(rows, columns, i), of) for i, of in enumerate(mask.chunk(frames))]
            for (frames, rows, columns, _), mask in zip(each, stays, strict=True)
        ]
    return layout_of_images(images, inputs, counts)


def _left(patches: Patches, stays: Tensor) -> Patches:
    return replace(patches, positions=patches.positions[stays], boxes=patches.boxes[stays])


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The mean over the patches of a token, which leave the tower one behind the other."""
    grids = _seen(core, inputs)
    patches = [n * rows * columns * of for each in grids.values() for n, rows, columns, of in each]
    runs = iter(torch.cat(seen)[-sum(patches) :].split(patches))
    values = {}
    for token, each in grids.items():
        means = [next(runs).view(-1, of).mean(1) for *_, of in each]
        stays = _in_prompt(core, inputs, token, [len(mean) for mean in means])
        values[token] = [mean[mask.to(mean.device)] for mean, mask in zip(means, stays, strict=True)]
    return values_of_images(values, inputs, counts)


FAMILIES = (
    Family(
        name="VideoLLaMA 3",
        model_types=("video_llama_3",),
        layout=layout,
        grid="the merged grid of `image_grid_thw`, `video_grid_thw`, of which `video_compression_mask` leaves some; a "
        "group per frame",
        saliency=Saliency(
            "mean attention received from the same image or frame in the last layer, per token",
            lambda core: attention_in(core.vision_model, -1), received, saliency,
        ),
        visual_tokens=("image_token_id", "video_token_id"),
        encoders=(IMAGES, VIDEOS),
        watched={IMAGES: Grids.seen, VIDEOS: Grids.seen},
        layout_inputs=("input_ids", COMPRESSION),
    ),
)  # fmt: skip
