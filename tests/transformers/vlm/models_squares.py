"""Small random models whose images have one size: DeepSeek-VL with one tower or two, Janus and GOT-OCR 2."""

from collections.abc import Sequence
from typing import Any

import torch

from .models import IMAGE, TEXT, Prompts
from .models_crops import noise, placeholders, random_model
from .models_towers import VISION

COUNTS = (1, 2)  # images of each sample


def _prompts(model: Any, side: int, tokens: int, counts: Sequence[int] = COUNTS) -> Prompts:
    """Images of side x side pixels, of so many tokens each."""
    draw = torch.Generator().manual_seed(3)
    ids = placeholders([[tokens] * count for count in counts], [IMAGE] * sum(counts), draw)
    return Prompts(model, {**ids, "pixel_values": noise(sum(counts), side, draw)}, IMAGE)


def deepseek_vl() -> Prompts:
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(**VISION, image_size=20, vision_use_head=False)
    config = DeepseekVLConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)
    return _prompts(random_model(DeepseekVLForConditionalGeneration, config, "sdpa"), 20, 25)


def deepseek_vl_hybrid() -> Prompts:
    """A tower as SAM's beside SigLIP, for larger pictures of the same images; both give one grid."""
    from transformers import (
        DeepseekVLHybridConfig,
        DeepseekVLHybridForConditionalGeneration,
        LlamaConfig,
        SamVisionConfig,
        SiglipVisionConfig,
    )

    large = SamVisionConfig(
        hidden_size=32, output_channels=8, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4,
        window_size=4, global_attn_indexes=[1], num_pos_feats=16, mlp_dim=48, initializer_range=0.02,
    )  # fmt: skip
    config = DeepseekVLHybridConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=20, vision_use_head=False), high_res_vision_config=large,
        text_config=LlamaConfig(**TEXT), image_token_id=IMAGE,
    )  # fmt: skip
    prompts = _prompts(random_model(DeepseekVLHybridForConditionalGeneration, config, "sdpa"), 20, 25)
    prompts.inputs["high_res_pixel_values"] = noise(sum(COUNTS), 32, torch.Generator().manual_seed(4))
    return prompts


def janus() -> Prompts:
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, LlamaConfig

    tower = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    vision = JanusVisionConfig(**tower, image_size=20, projection_dim=TEXT["hidden_size"], num_image_tokens=25)
    codes = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
    config = JanusConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE,
        vq_config={**codes, "num_embeddings": 16, "projection_dim": 32, "image_token_embed_dim": 32},
    )  # fmt: skip
    return _prompts(random_model(JanusForConditionalGeneration, config, "sdpa"), 20, 25)


def got_ocr2() -> Prompts:
    """18 x 18 patches, of which convolutions make 5 x 5 tokens; windows of 4 x 4 patches in one layer."""
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, GotOcr2VisionConfig, Qwen2Config

    vision = GotOcr2VisionConfig(
        hidden_size=32, mlp_dim=48, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=36,
        patch_size=2, window_size=4, global_attn_indexes=[1], initializer_range=0.02,
    )  # fmt: skip
    config = GotOcr2Config(vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_index=IMAGE)
    return _prompts(random_model(GotOcr2ForConditionalGeneration, config, "sdpa"), 36, 25)
