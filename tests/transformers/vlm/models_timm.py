"""Small random models whose vision tower is one of timm, Gemma 3n and Perception LM: a convolution is in its place."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from .models import IMAGE, PAD, TEXT, Prompts
from .models_crops import VIDEO, noise, placeholders, random_model

SIDE = 5  # of a square of tokens
PIXELS = 4  # along a side of a token
IDS = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 1}
WINDOW = 12
WIDTH = 32


class Square(nn.Module):
    """As MobileNetV5: a square of tokens, [images, C, SIDE, SIDE]."""

    def __init__(self) -> None:
        super().__init__()
        self.timm_model = nn.Module()
        self.timm_model.msfa = nn.Conv2d(3, WIDTH, PIXELS, PIXELS)
        self.timm_model.msfa.output_resolution = (SIDE, SIDE)  # type: ignore[assignment]

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        return _output(self.timm_model.msfa(pixel_values))


class Patches(nn.Module):
    """As a vision transformer: a class token and twice as many patches down and across, [images, 1 + patches, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.timm_model = nn.Module()
        self.timm_model.patch_embed = nn.Conv2d(3, WIDTH, PIXELS // 2, PIXELS // 2)
        self.timm_model.patch_embed.grid_size = (2 * SIDE, 2 * SIDE)  # type: ignore[assignment]

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        patches = self.timm_model.patch_embed(pixel_values).flatten(2).mT
        return _output(torch.cat([patches.mean(1, keepdim=True), patches], 1))


def _output(hidden: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=hidden)


@contextmanager
def _in_place_of(model_type: str, tower: type[nn.Module]) -> Iterator[None]:
    from transformers import AutoModel

    made = AutoModel.from_config

    def from_config(config: Any, **more: Any) -> Any:
        return tower() if config.model_type == model_type else made(config, **more)

    with patch.object(AutoModel, "from_config", from_config):
        yield


def _gemma3n_config(shared: int) -> Any:
    from transformers import Gemma3nAudioConfig, Gemma3nConfig, Gemma3nTextConfig, Gemma3nVisionConfig

    # The last layers reuse the keys and values of the two before them.
    language = Gemma3nTextConfig(
        **{**TEXT, "num_hidden_layers": 6}, **IDS, head_dim=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 3, num_kv_shared_layers=shared,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=98, altup_num_inputs=3, altup_active_idx=1, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 6,
    )  # fmt: skip
    # The last ids of the vocabulary have embeddings of their own, for images and for sound.
    vision = Gemma3nVisionConfig(hidden_size=WIDTH, vocab_offset=98, vocab_size=8)
    audio = Gemma3nAudioConfig(
        hidden_size=32, conf_num_attention_heads=2, conf_num_hidden_layers=1, sscp_conv_channel_size=(8, 4),
        vocab_offset=106, vocab_size=8,
    )  # fmt: skip
    return Gemma3nConfig(
        text_config=language, vision_config=vision, audio_config=audio, vision_soft_tokens_per_image=SIDE**2,
        image_token_id=IMAGE, audio_token_id=110, boi_token_id=104, eoi_token_id=105, boa_token_id=106,
        eoa_token_id=107,
    )  # fmt: skip


def gemma3n(counts: Sequence[int] = (1, 2), *, shared: int = 0) -> Prompts:
    """So many images in each sample."""
    from transformers import Gemma3nForConditionalGeneration
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAttention

    if "shared_kv_states" not in inspect.signature(Gemma3nTextAttention.forward).parameters:
        raise ImportError("whose Gemma 3n shares keys by its cache alone")
    with _in_place_of("gemma3n_vision", Square):
        model = random_model(Gemma3nForConditionalGeneration, _gemma3n_config(shared), "sdpa")
    draw = torch.Generator().manual_seed(3)
    ids = placeholders([[SIDE**2] * count for count in counts], [IMAGE] * sum(counts), draw)
    pixels = noise(sum(counts), SIDE * PIXELS, draw)
    return Prompts(model, {**ids, "pixel_values": pixels}, IMAGE, special=tuple(range(98, TEXT["vocab_size"])))


def gemma3n_shared() -> Prompts:
    return gemma3n(shared=2)


def perception_lm() -> Prompts:
    """An image of two tiles and a video of a frame, and a video of two frames; 2 x 2 patches are pooled to a token."""
    from transformers import LlamaConfig, PerceptionLMConfig, PerceptionLMForConditionalGeneration, TimmWrapperConfig

    config = PerceptionLMConfig(
        vision_config=TimmWrapperConfig(model_args={"embed_dim": WIDTH}), text_config=LlamaConfig(**TEXT),
        projector_pooling_ratio=2, image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip
    with _in_place_of("timm_wrapper", Patches):
        model = random_model(PerceptionLMForConditionalGeneration, config, "sdpa")
    draw = torch.Generator().manual_seed(3)
    tile = SIDE**2
    inputs = {
        **placeholders([[2 * tile, tile], [2 * tile]], [IMAGE, VIDEO, VIDEO], draw),
        "pixel_values": noise(2, SIDE * PIXELS, draw).unsqueeze(0),
        "pixel_values_videos": noise(3, SIDE * PIXELS, draw).unsqueeze(0),
    }
    return Prompts(model, inputs, (IMAGE, VIDEO))
