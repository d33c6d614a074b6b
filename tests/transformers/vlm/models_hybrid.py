"""Small random models with linear attention in most decoder layers, full attention in some: Qwen3.5, dense and mixed,
and MiniCPM-V 4.6."""

import functools
from typing import Any

import pytest
import torch

from . import models_qwen as qwen
from .models import TEXT, Prompts, left_padded, text
from .models_crops import random_model
from .models_mrope import EXPERTS, TEXT_CONFIG
from .runs_qwen import RAGGED

L, F = "linear_attention", "full_attention"
# Half of a head of 16 is rotated, by 4 frequencies. What a small state gives is normalised: with an epsilon of 1e-6, a
# result near 0 would make of the rounding of float32 a thousand times more.
ROPE = {**qwen.ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
HYBRID = {
    **TEXT_CONFIG, "initializer_range": 0.12, "head_dim": 16, "rope_parameters": ROPE, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-2,
}  # fmt: skip
VISION = {
    **qwen.VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"],
    "num_position_embeddings": 36,
}  # fmt: skip
# model_type: the classes of the model and its config, and what its text config has besides. The mixture of experts has
# the order of layers of the published models, and then one layer more: none with full attention comes behind it.
_MADE_OF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", {"layer_types": [L, F, L, F]}),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig",
        {
            **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48, "num_hidden_layers": 5,
            "layer_types": [L, L, L, F, L],
        },
    ),
}  # fmt: skip
NAMES = tuple(_MADE_OF)


def served() -> bool:
    """Whether caches of this version of transformers have layers for linear attention."""
    from transformers import cache_utils

    return hasattr(cache_utils, "LinearAttentionLayer")


@functools.cache
def model(name: str) -> Any:
    import transformers

    kind, config, text = _MADE_OF[name]
    for lacking in {kind, config} - set(dir(transformers)):
        pytest.skip(f"transformers {transformers.__version__} has no {lacking}")
    torch.manual_seed(11)
    made = getattr(transformers, kind)(
        getattr(transformers, config)(text_config={**HYBRID, **text}, vision_config=VISION, **qwen.IDS)
    ).eval()
    assert made.config.model_type == name
    made.set_attn_implementation("sdpa")
    return made


@functools.cache
def batch(name: str) -> Prompts:
    """The prompts of runs_qwen.py: ragged images, and a video, behind left padding."""
    if not served():
        pytest.skip("caches of this version of transformers have no layers for linear attention: refused")
    return qwen.prompts(model(name), RAGGED)


# Images in rows and columns of patches, of which 4 x 4 make a token, and a frame of a video of each sample.
SLICES = [[(8, 12), (4, 8)], [(8, 8)]]
FRAMES = [[(4, 8), (4, 8)], [(8, 4)]]


def minicpmv() -> Prompts:
    """A tower that merges 2 x 2 patches behind its second layer, and a merger behind it."""
    if not served():
        raise ImportError("whose caches have no layers for linear attention: refused")
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    config = MiniCPMV4_6Config(
        text_config={**HYBRID, "layer_types": [L, F, L, F], "model_type": "qwen3_5_text"},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 32, "patch_size": qwen.PATCH,
        },
        insert_layer_id=1, image_token_id=qwen.IMAGE, video_token_id=qwen.VIDEO,
    )  # fmt: skip
    made = random_model(MiniCPMV4_6ForConditionalGeneration, config, "sdpa")
    draw = torch.Generator().manual_seed(3)
    samples = []
    for b, (images, frames) in enumerate(zip(SLICES, FRAMES, strict=True)):
        ids = text(3, draw)
        for token, grids in ((qwen.IMAGE, images), (qwen.VIDEO, frames)):
            for rows, columns in grids:
                ids += [102, *[token] * (rows * columns // 16), 103, *text(1, draw)]
        samples.append(ids + text(4 + 2 * b, draw))
    inputs = left_padded(samples)
    for name, sizes in (("", SLICES), ("_videos", FRAMES)):
        grids = [grid for sample in sizes for grid in sample]
        patches = sum(rows * columns for rows, columns in grids)
        inputs[f"target_sizes{name}"] = torch.tensor(grids, dtype=torch.int32)
        inputs[f"pixel_values{name}"] = torch.randn(1, 3, qwen.PATCH, patches * qwen.PATCH, generator=draw)
    return Prompts(made, inputs, (qwen.IMAGE, qwen.VIDEO), (102, 103))
