"""Small random models of families around Qwen-VL: mixtures of experts and GLM-V; models_qwen.py makes their prompts."""

import functools
from typing import Any

import pytest

from . import models_qwen as qwen
from .models import TEXT, Prompts

# glm4v_moe mixes in the last two of four layers, qwen3_vl_moe in the first, third and fourth.
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
TEXT_CONFIG = {**TEXT, **qwen.WIDE, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
GLM_VISION = {
    **qwen.VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"], "image_size": 24,
}  # fmt: skip
# Half of a head of 16 is rotated, by 4 frequencies.
GLM_HALF = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
# model_type: the classes of the model and its config, what its text config has besides, and its vision config.
_GLM_DENSE = {"rope_parameters": GLM_HALF, "model_type": "glm4v_text"}, {**GLM_VISION, "model_type": "glm4v_vision"}
_GLM_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
_MADE_OF: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {
            **EXPERTS, "num_experts": 4, "mlp_only_layers": [1], "head_dim": 16,
            "rope_parameters": {**qwen.ROPE, "mrope_interleaved": True},
        },
        {
            **qwen.VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"],
            "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2],
        },
    ),
    "glm4v": ("Glm4vForConditionalGeneration", "Glm4vConfig", *_GLM_DENSE),
    "glm46v": ("Glm46VForConditionalGeneration", "Glm46VConfig", *_GLM_DENSE),
    "glmga": ("Glm46VForConditionalGeneration", "GlmgaConfig", *_GLM_DENSE),
    "glm4v_moe": (
        "Glm4vMoeForConditionalGeneration", "Glm4vMoeConfig",
        {**EXPERTS, **_GLM_EXPERTS, "rope_parameters": GLM_HALF}, GLM_VISION,
    ),
    "glm_ocr": (
        "GlmOcrForConditionalGeneration", "GlmOcrConfig", {"rope_parameters": qwen.ROPE, "head_dim": 16}, GLM_VISION,
    ),
}  # fmt: skip
NAMES = tuple(_MADE_OF)
GLM = tuple(name for name in NAMES if name.startswith("glm"))


@functools.cache
def model(name: str) -> Any:
    import torch
    import transformers

    kind, config, text, vision = _MADE_OF[name]
    for lacking in {kind, config} - set(dir(transformers)):
        pytest.skip(f"transformers {transformers.__version__} has no {lacking}")
    torch.manual_seed(11)
    made = getattr(transformers, kind)(
        getattr(transformers, config)(text_config={**TEXT_CONFIG, **text}, vision_config=vision, **qwen.IDS)
    ).eval()
    assert made.config.model_type == name
    made.set_attn_implementation("sdpa")
    return made


def prompts(name: str, samples: list[list[qwen.Part]]) -> Prompts:
    """GLM has one id for images and frames, and knows by the types of the tokens which is which."""
    made = qwen.prompts(model(name), samples)
    if name not in GLM:
        return made
    ids = made.inputs["input_ids"]
    return Prompts(made.model, {**made.inputs, "input_ids": ids.where(ids != qwen.VIDEO, qwen.IMAGE)}, (qwen.IMAGE,))


# Ragged images and a video behind left padding, as in runs_qwen.py; GLM takes images or videos.
IMAGES: list[list[qwen.Part]] = [[3, (1, 8, 12), 2, (1, 4, 8), 5], [2, (1, 8, 8), 4]]
VIDEOS: list[list[qwen.Part]] = [[2, ("video", (3, 4, 8)), 5], [3, ("video", (2, 8, 4)), 1, ("video", (1, 4, 4)), 4]]


@functools.cache
def batch(name: str, kind: str = "images") -> Prompts:
    """Of one kind, or "both" together."""
    together: list[list[qwen.Part]] = [[*image[:-1], *video] for image, video in zip(IMAGES, VIDEOS, strict=True)]
    return prompts(name, {"images": IMAGES, "videos": VIDEOS, "both": together}[kind])
