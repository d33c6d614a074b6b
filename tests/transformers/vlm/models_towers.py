"""Small random LLaVAs with other vision towers and language models than CLIP and Llama."""

from collections.abc import Sequence
from typing import Any

import torch

from .models import IMAGE, PAD, TEXT, Prompts, left_padded, text
from .models_crops import SINGLE, Images, llava_next, random_model

ROW_END, IMAGE_END = 102, 103
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}


def pixtral(images: Images = SINGLE, *, attention: str = "sdpa") -> Prompts:
    """Pixtral: each image has patches of its own size, and a token behind each row of them."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PixtralVisionConfig

    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**VISION, image_size=64),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = random_model(LlavaForConditionalGeneration, config, attention)
    draw = torch.Generator().manual_seed(3)
    grids = [[(height // 4, width // 4) for height, width in sample] for sample in images]
    sizes = torch.tensor([(4 * rows, 4 * columns) for sample in grids for rows, columns in sample])
    pixels = torch.zeros(len(sizes), 3, *sizes.amax(0).tolist())
    for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=draw)
    samples = []
    for b, sample in enumerate(grids):
        ids = text(3, draw)
        for i, (rows, columns) in enumerate(sample):
            ids += [*([*[IMAGE] * columns, ROW_END] * rows)[:-1], IMAGE_END, *text(2 + i, draw)]
        samples.append(ids + text(4 + 2 * b, draw))
    return Prompts(model, {**left_padded(samples), "pixel_values": pixels, "image_sizes": sizes}, IMAGE)


def _llava(vision: Any, language: Any, tokens: int, **more: Any) -> Prompts:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(vision_config=vision, text_config=language, image_token_id=IMAGE, **more)
    return _an_image_each(random_model(LlavaForConditionalGeneration, config, "sdpa"), tokens)


def _an_image_each(model: Any, tokens: int) -> Prompts:
    """Two samples with an image of 20 x 20 pixels each."""
    draw = torch.Generator().manual_seed(3)
    samples = [[*text(3, draw), *[IMAGE] * tokens, *text(count, draw)] for count in (4, 6)]
    return Prompts(model, {**left_padded(samples), "pixel_values": torch.randn(2, 3, 20, 20, generator=draw)}, IMAGE)


def siglip(layer: int | Sequence[int] = -2) -> Prompts:
    """5 x 5 patches and no class token."""
    from transformers import LlamaConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(**VISION, image_size=20, vision_use_head=False)
    full = {"vision_feature_layer": layer, "vision_feature_select_strategy": "full"}
    return _llava(vision, LlamaConfig(**TEXT), 25, **full)


def vipllava() -> Prompts:
    """The features of two layers; 5 x 5 patches, and a class token that is left out."""
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=20), text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE, vision_feature_layers=[-2, 1],
    )  # fmt: skip
    return _an_image_each(random_model(VipLlavaForConditionalGeneration, config, "sdpa"), 25)


def clip_with_its_class_token() -> Prompts:
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(**VISION, image_size=20)
    return _llava(vision, LlamaConfig(**TEXT), 26, vision_feature_select_strategy="full")


def fused() -> Prompts:
    """A decoder that makes queries, keys and values in one projection."""
    from transformers import CLIPVisionConfig, Phi3Config

    language = Phi3Config(**TEXT, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
    return _llava(CLIPVisionConfig(**VISION, image_size=20), language, 25)


def granite(images: Images = SINGLE) -> Prompts:
    """Granite Vision: LLaVA-NeXT with SigLIP, whose features are those of several layers."""
    from transformers import GraniteConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(**VISION, image_size=16, vision_use_head=False)
    language = GraniteConfig(**TEXT, attention_multiplier=0.25)
    layers = {"vision_feature_layer": [-3, -1], "vision_feature_select_strategy": "full"}
    return llava_next(images, vision=vision, language=language, **layers)
