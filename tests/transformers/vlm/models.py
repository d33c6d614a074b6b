"""One small random model per family, and prompts for it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 512,
}  # fmt: skip
IMAGE, PAD = 100, 0


@dataclass
class Prompts:
    """A model and a batch for it; every tensor is an argument of `model(...)` and of `model.generate(...)`."""

    model: Any
    inputs: dict[str, Tensor]
    visual: int | tuple[int, ...]  # the ids that stand for visual tokens
    special: tuple[int, ...] = ()  # other ids that no text may have
    new_type: int = 0  # the token_type_ids of tokens that are decoded


def text(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 90, (count,), generator=generator).tolist()


def left_padded(samples: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, samples))
    ids = torch.tensor([[PAD] * (longest - len(s)) + s for s in samples])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in samples]),
    }


def llava_padded() -> Prompts:
    return llava(3, ragged=True)


def llava(batch: int = 1, *, ragged: bool = False, images: int = 1, attention: str = "sdpa") -> Prompts:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    draw = torch.Generator().manual_seed(3)
    samples = []
    for b in range(batch):
        sample = text(3, draw)
        for i in range(images):
            sample += [IMAGE] * 36 + text(2 + i, draw)
        samples.append(sample + text(4 + (2 * b if ragged else 0), draw))
    pixels = torch.randn(batch * images, 3, 24, 24, generator=draw)
    return Prompts(model, {**left_padded(samples), "pixel_values": pixels}, IMAGE)
