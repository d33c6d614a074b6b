"""Small random LLaVA-NeXT-Video and Video-LLaVA models, and prompts with images beside videos of three frames."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from .models import IMAGE, TEXT, Prompts
from .models_crops import VIDEO, crops_of, noise, placeholders, random_model, stacked

FRAMES = 3
SIDE = 20  # pixels of a crop or frame of LLaVA-NeXT-Video: 5 x 5 patches, of which the pooling leaves 2 x 2 tokens
WIDE = (20, 44)  # an image in three crops, 5 x 15 patches of which the middle 11 columns are left
PATCHES = 9  # of an image or frame of Video-LLaVA, 3 x 3
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}
BOTH = {"image_token_index": IMAGE, "video_token_index": VIDEO}


@functools.cache
def _llava_next_video() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
    )

    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE), text_config=LlamaConfig(**TEXT), **BOTH,
        image_grid_pinpoints=[[20, 40], [40, 20], [40, 40], [20, 60]], spatial_pool_stride=2,
    )  # fmt: skip
    return random_model(LlavaNextVideoForConditionalGeneration, config, "sdpa")


def llava_next_video() -> Prompts:
    """A video in each sample, and in the second one an image in crops in front of it."""
    model = _llava_next_video()
    draw = torch.Generator().manual_seed(3)
    image = {
        "pixel_values": stacked([noise(crops_of(WIDE, model.config.image_grid_pinpoints, SIDE), SIDE, draw)]),
        "image_sizes": torch.tensor([WIDE]),
    }
    with torch.no_grad():
        (features,) = model.model.get_image_features(**image, return_dict=True).pooler_output
    video = FRAMES * 4
    ids = placeholders([[video], [len(features), video]], [VIDEO, IMAGE, VIDEO], draw)
    pixels = torch.randn(2, FRAMES, 3, SIDE, SIDE, generator=draw)
    return Prompts(model, {**ids, **image, "pixel_values_videos": pixels}, (IMAGE, VIDEO))


@functools.cache
def _video_llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=12), text_config=LlamaConfig(**TEXT), **BOTH
    )
    return random_model(VideoLlavaForConditionalGeneration, config, "sdpa")


def images_are_called(model: Any) -> str:
    return "pixel_values" if "pixel_values" in inspect.signature(model.forward).parameters else "pixel_values_images"


def _images(model: Any, count: int, draw: torch.Generator) -> dict[str, Tensor]:
    return {images_are_called(model): noise(count, 12, draw)}


def video_llava_images() -> Prompts:
    """Two images, and one."""
    model, draw = _video_llava(), torch.Generator().manual_seed(3)
    ids = placeholders([[PATCHES, PATCHES], [PATCHES]], [IMAGE] * 3, draw)
    return Prompts(model, {**ids, **_images(model, 3, draw)}, (IMAGE, VIDEO))


def video_llava_videos() -> Prompts:
    """A video in each sample, and in the second one an image in front of it. Of a frame there is a class token too."""
    model, draw = _video_llava(), torch.Generator().manual_seed(3)
    video = FRAMES * (PATCHES + 1)
    ids = placeholders([[video], [PATCHES, video]], [VIDEO, IMAGE, VIDEO], draw)
    pixels = torch.randn(2, FRAMES, 3, 12, 12, generator=draw)
    return Prompts(model, {**ids, **_images(model, 1, draw), "pixel_values_videos": pixels}, (IMAGE, VIDEO))
