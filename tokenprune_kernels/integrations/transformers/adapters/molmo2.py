"""Molmo 2: a view of all of an image and one of its crops together, pooled to tokens that see each other; frames."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout, grid_patches
from .images import encoded_with, layout_of_images, values_of_images
from .towers import attention_in, mean_attention

IMAGES, VIDEOS = "get_image_features", "get_video_features"


@dataclass(frozen=True)
class Views:
    """What images or videos were encoded with.

    grids: of images [images, 4], rows and columns of tokens of both views; of videos [videos, 3], frames, and rows and
    columns of each. pooled [tokens, patches]: which patches of the tower's run a token is made of, -1 after the last;
    all -1: it is none.
    """

    grids: Tensor
    pooled: Tensor

    @classmethod
    def seen(cls, arguments: Inputs) -> "Views":
        kind = "video" if "video_grids" in arguments else "image"
        return cls(arguments[f"{kind}_grids"].detach(), arguments[f"{kind}_token_pooling"].detach())

    def each(self) -> list[list[tuple[int, int]]]:
        """Rows and columns of tokens of the views of each image, or of the frames of each video."""
        if self.grids.shape[1] == 3:
            return [[(rows, columns)] * frames for frames, rows, columns in self.grids.tolist()]
        return [[(a, b), (c, d)] for a, b, c, d in self.grids.tolist()]


def _views(inputs: Inputs) -> Views:
    """A call has images or videos."""
    images, videos = encoded_with(inputs, IMAGES, VIDEOS)
    found: Views = images or videos
    return found


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Both views of an image see all of it, a group each; every frame of a video is a group and an image of its own."""
    views = _views(inputs)
    frames = views.grids.shape[1] == 3
    images = [[grid_patches(*grid, i if frames else 0) for i, grid in enumerate(each)] for each in views.each()]
    return layout_of_images({core.config.image_token_id: images}, inputs, counts)


def attention(core: Model) -> nn.Module:
    """Of the deepest layer whose output the model takes."""
    taken = core.config.adapter_config.vision_feature_layer
    return attention_in(core.vision_tower, [layer + 1 if layer >= 0 else layer for layer in taken])


def received(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """[crops or frames, patches]"""
    return mean_attention(query, key, scale)


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """The mean over the patches of a token."""
    views = _views(inputs)
    pooled = views.pooled[(views.pooled >= 0).any(1)]
    real = pooled >= 0
    patches = seen[-1].flatten()[pooled.clamp_min(0)].float()
    values = torch.where(real, patches, 0).sum(1) / real.sum(1)
    lengths = [sum(rows * columns for rows, columns in each) for each in views.each()]
    return values_of_images({core.config.image_token_id: values.split(lengths)}, inputs, counts)


FAMILIES = (
    Family(
        name="Molmo 2",
        model_types=("molmo2",),
        layout=layout,
        grid="a grid per view of an image, all of it and its crops, of `image_grids`, and per frame, of `video_grids`; "
        "a group each",
        saliency=Saliency(
            "mean attention received in the deepest of `vision_feature_layer`, its mean over the patches of a token",
            attention, received, saliency,
        ),
        encoders=(IMAGES, VIDEOS),
        watched={IMAGES: Views.seen, VIDEOS: Views.seen},
        normed=lambda layer, hidden: hidden if layer.norm_after else layer.input_layernorm(hidden),
        rotary=lambda decoder, layer: (
            decoder.rotary_emb if decoder.rope_types[layer] == "scaled" else decoder.rotary_emb_unscaled
        ),
    ),
)  # fmt: skip
