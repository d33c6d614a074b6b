"""Small random models whose tower takes images of any size, and whose tokens are blocks of 2 x 2 patches: LightOnOCR,
LFM2-VL with convolutions in its decoder, PaddleOCR-VL with mRoPE, and VideoLLaMA 3."""

import torch
from torch import Tensor

from . import models_qwen as qwen
from .models import IMAGE, PAD, TEXT, Prompts
from .models_crops import VIDEO, Images, placeholders, random_model
from .models_towers import VISION
from .models_window import FLAT, SIZES

PATCH = VISION["patch_size"]
IDS = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 1}
# In front of the first and behind the second layer with keys there is one without.
CONVOLUTIONS = ["conv", "full_attention"] * 2


def _grids(images: Images) -> list[tuple[int, int]]:
    """Rows and columns of patches of each; SIZES has one whose last ones have no partner."""
    return [(height // PATCH, width // PATCH) for sample in images for height, width in sample]


def _ids(images: Images, draw: torch.Generator) -> dict[str, Tensor]:
    batch = [[rows // 2 * (columns // 2) for rows, columns in _grids([sample])] for sample in images]
    return placeholders(batch, [IMAGE] * sum(map(len, batch)), draw)


def _patches(grids: list[tuple[int, int]], draw: torch.Generator) -> list[Tensor]:
    return [torch.randn(rows * columns, 3 * PATCH**2, generator=draw) for rows, columns in grids]


def lighton_ocr(images: Images = SIZES) -> Prompts:
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration, PixtralVisionConfig, Qwen3Config

    config = LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**VISION, image_size=64),
        text_config=Qwen3Config(**TEXT, **IDS, head_dim=16), image_token_id=IMAGE,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(3)
    sizes = torch.tensor([size for sample in images for size in sample])
    pixels = torch.zeros(len(sizes), 3, *sizes.amax(0).tolist())
    for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=draw)
    model = random_model(LightOnOcrForConditionalGeneration, config, "sdpa")
    return Prompts(model, {**_ids(images, draw), "pixel_values": pixels, "image_sizes": sizes}, IMAGE)


def lfm2_vl(images: Images = FLAT) -> Prompts:
    """The tower pads images to the largest one."""
    from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig, cache_utils

    if not hasattr(cache_utils, "LinearAttentionLayer"):
        raise ImportError("whose caches have no layers for convolutions: refused")
    language = Lfm2Config(**TEXT, **IDS, layer_types=CONVOLUTIONS, block_auto_adjust_ff_dim=False, conv_L_cache=3)
    vision = Siglip2VisionConfig(**VISION, num_patches=36, vision_use_head=False)
    config = Lfm2VlConfig(vision_config=vision, text_config=language, image_token_id=IMAGE, projector_hidden_size=48)
    draw = torch.Generator().manual_seed(3)
    grids = _grids(images)
    each = _patches(grids, draw)
    most = max(map(len, each))
    inputs = {
        "pixel_values": torch.stack([torch.nn.functional.pad(p, (0, 0, 0, most - len(p))) for p in each]),
        "pixel_attention_mask": torch.stack([(torch.arange(most) < len(p)).long() for p in each]),
        "spatial_shapes": torch.tensor(grids),
    }
    model = random_model(Lfm2VlForConditionalGeneration, config, "sdpa")
    return Prompts(model, {**_ids(images, draw), **inputs}, IMAGE)


def paddleocr_vl(images: Images = SIZES) -> Prompts:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    config = PaddleOCRVLConfig(
        vision_config={**VISION, "image_size": 24},
        text_config={**TEXT, **IDS, "head_dim": 16, "rope_parameters": qwen.ROPE}, **qwen.IDS,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(3)
    grids = [(rows // 2 * 2, columns // 2 * 2) for rows, columns in _grids(images)]  # as the processor makes them
    ids = _ids(images, draw)
    inputs = {
        **ids, "mm_token_type_ids": (ids["input_ids"] == IMAGE).long(),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
        "pixel_values": torch.cat(_patches(grids, draw)).view(-1, 3, PATCH, PATCH),
    }  # fmt: skip
    model = random_model(PaddleOCRVLForConditionalGeneration, config, "sdpa")
    return Prompts(model, inputs, IMAGE, special=(qwen.VIDEO, qwen.VISION_START, qwen.VISION_END))


# Frames, and rows and columns of patches, of the images and of the video of each sample.
STILLS = [[(1, 4, 6), (1, 4, 4)], [(1, 6, 6)]]
CLIPS = [[(3, 4, 4)], [(2, 4, 6)]]


def video_llama_3() -> Prompts:
    """Of a video, the first frame is whole, and every third token of the others is left out."""
    from transformers import (
        Qwen2Config,
        VideoLlama3Config,
        VideoLlama3ForConditionalGeneration,
        VideoLlama3VisionConfig,
    )

    config = VideoLlama3Config(
        vision_config=VideoLlama3VisionConfig(**VISION), text_config=Qwen2Config(**TEXT), image_token_id=IMAGE,
        video_token_id=VIDEO,
    )  # fmt: skip
    model = random_model(VideoLlama3ForConditionalGeneration, config, "sdpa")
    draw = torch.Generator().manual_seed(3)
    stays, batch, visual = [], [], []
    for images, videos in zip(STILLS, CLIPS, strict=True):
        counts = [rows * columns // 4 for _, rows, columns in images]
        for frames, rows, columns in videos:
            index = torch.arange(frames * rows * columns // 4)
            stays.append((index < rows * columns // 4) | (index % 3 != 0))
            counts.append(int(stays[-1].sum()))
        batch.append(counts)
        visual += [IMAGE] * len(images) + [VIDEO] * len(videos)
    inputs = {**placeholders(batch, visual, draw), "video_compression_mask": torch.cat(stays)}
    for name, kind, sizes in (("", "image", STILLS), ("_videos", "video", CLIPS)):
        grids = torch.tensor([grid for sample in sizes for grid in sample])
        inputs[f"{kind}_grid_thw"], inputs[f"{kind}_merge_sizes"] = grids, torch.full((len(grids),), 2)
        inputs[f"pixel_values{name}"] = torch.randn(int(grids.prod(1).sum()), 3 * PATCH**2, generator=draw)
    return Prompts(model, inputs, (IMAGE, VIDEO))
