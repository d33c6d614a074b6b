"""Small random thinkers of Qwen2.5-Omni and Qwen3-Omni, and prompts with images, videos and sound."""

import functools
from typing import Any

import pytest
import torch

from . import models_qwen as qwen
from .models import TEXT, Prompts
from .models_mrope import EXPERTS, TEXT_CONFIG

AUDIO, AUDIO_START, AUDIO_END = 104, 105, 106
SPECIAL = [*qwen.SPECIAL, AUDIO, AUDIO_START, AUDIO_END]
NAMES = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
MEL = 8
# Frames of a spectrogram, and how many tokens the audio tower of each model makes of them.
LONG, SHORT = 20, 16
TOKENS = {"qwen2_5_omni_thinker": {LONG: 5, SHORT: 4}, "qwen3_omni_moe_thinker": {LONG: 3, SHORT: 2}}
SOUND = {
    "num_mel_bins": MEL, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16,
    "max_source_positions": 64, "output_dim": TEXT["hidden_size"],
}  # fmt: skip
VISION = {**qwen.VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"]}
IDS = {
    "audio_start_token_id": AUDIO_START, "vision_start_token_id": qwen.VISION_START,
    "vision_end_token_id": qwen.VISION_END, "position_id_per_seconds": 2, **qwen.WIDE,
}  # fmt: skip


def _config(name: str) -> tuple[Any, Any]:
    import transformers as tf

    if name == "qwen2_5_omni_thinker":
        vision = {**VISION, "window_size": 2 * qwen.MERGE * qwen.PATCH, "fullatt_block_indexes": [0, 1]}
        return tf.Qwen2_5OmniThinkerForConditionalGeneration, tf.Qwen2_5OmniThinkerConfig(
            text_config={**TEXT_CONFIG, "rope_parameters": qwen.ROPE}, vision_config=vision, audio_config=SOUND,
            image_token_index=qwen.IMAGE, video_token_index=qwen.VIDEO, audio_token_index=AUDIO, **IDS,
        )  # fmt: skip
    text = {
        **TEXT_CONFIG, **EXPERTS, "num_experts": 4, "head_dim": 16,
        "rope_parameters": {**qwen.ROPE, "mrope_interleaved": True},
    }  # fmt: skip
    vision = {**VISION, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]}
    return tf.Qwen3OmniMoeThinkerForConditionalGeneration, tf.Qwen3OmniMoeThinkerConfig(
        text_config=text, vision_config=vision, audio_config={**SOUND, "downsample_hidden_size": 8},
        image_token_id=qwen.IMAGE, video_token_id=qwen.VIDEO, audio_token_id=AUDIO, **IDS,
    )  # fmt: skip


def served() -> bool:
    """Whether the thinker of this version of transformers is a multimodal model below its head."""
    import transformers as tf

    return hasattr(tf, "Qwen2_5OmniThinkerModel")


@functools.cache
def model(name: str) -> Any:
    kind, config = _config(name)
    torch.manual_seed(11)
    made = kind(config).eval()
    assert made.config.model_type == name
    made.set_attn_implementation("sdpa")
    return made


def _sound(name: str, frames: int) -> list[int]:
    return [AUDIO_START] + [AUDIO] * TOKENS[name][frames] + [AUDIO_END]


def _with_sound(made: Prompts, frames: list[int]) -> Prompts:
    """Spectrograms of these lengths, padded to the longest, in place of the types of the tokens."""
    draw = torch.Generator().manual_seed(5)
    inputs = {n: t for n, t in made.inputs.items() if n != "mm_token_type_ids"}
    inputs["input_features"] = torch.randn(len(frames), MEL, max(frames), generator=draw)
    inputs["feature_attention_mask"] = torch.tensor([[1] * n + [0] * (max(frames) - n) for n in frames])
    return Prompts(made.model, inputs, made.visual)


@functools.cache
def batch(name: str) -> Prompts:
    """Ragged images, a video and sound behind left padding: 44 visual tokens and 16."""
    if not served():
        pytest.skip("the thinker of this version of transformers is refused")
    made = qwen.prompts(
        model(name),
        [
            [3, (1, 8, 12), 2, _sound(name, LONG), 2, (1, 4, 8), 2, ("video", (3, 4, 4)), 5],
            [2, _sound(name, SHORT), 1, (1, 8, 8), 4],
        ],
    )
    made.inputs["video_second_per_grid"] = torch.tensor([2.0])
    return _with_sound(made, [LONG, SHORT])


@functools.cache
def sound_in_video(name: str) -> Prompts:
    """A video of three frames of 2 x 2 tokens, 4 positions apart, between whose tokens are those of its sound."""
    if not served():
        pytest.skip("the thinker of this version of transformers is refused")
    frame, tokens = [qwen.VIDEO] * 4, [AUDIO] * TOKENS[name][LONG]
    inside = [*frame, *tokens[:4], *frame, *tokens[4:], *frame]
    mixed = [qwen.VISION_START, AUDIO_START, *inside, AUDIO_END, qwen.VISION_END]
    made = qwen.prompts(model(name), [[3, mixed, 4]])
    made.inputs["video_grid_thw"] = torch.tensor([[3, 4, 4]])
    draw = torch.Generator().manual_seed(6)
    patches = 3 * 4 * 4
    made.inputs["pixel_values_videos"] = torch.randn(
        patches, qwen.CHANNELS * qwen.TIMES * qwen.PATCH**2, generator=draw
    )
    made.inputs["video_second_per_grid"] = torch.tensor([2.0])
    return _with_sound(made, [LONG])
