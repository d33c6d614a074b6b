"""Small random Qwen2-VL, Qwen2.5-VL and Qwen3-VL models, and prompts with images of several sizes and videos."""

from typing import Any

import torch

from .models import TEXT, Prompts, left_padded, text

IMAGE, VIDEO, VISION_START, VISION_END = 100, 101, 102, 103
SPECIAL = [IMAGE, VIDEO, VISION_START, VISION_END]
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Whose prompts have the time beside every frame, and vision tokens around each.
STAMPED = (
    "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr",
)  # fmt: skip
MERGE, PATCH, CHANNELS, TIMES = 2, 4, 3, 2

# Weights of the usual 0.02 make such small layers nearly constant: attention uniform, logits of all tokens alike.
WIDE = {"initializer_range": 0.15}
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VISION = {
    "depth": 3, "num_heads": 4, "in_channels": CHANNELS, "patch_size": PATCH, "spatial_merge_size": MERGE,
    "temporal_patch_size": TIMES, **WIDE,
}  # fmt: skip


def _config(name: str) -> tuple[Any, Any]:
    import transformers as tf

    text_config = {**TEXT, **WIDE, "rope_parameters": ROPE, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    width = TEXT["hidden_size"]
    if name == "qwen2_vl":
        vision = {**VISION, "embed_dim": 32, "hidden_size": width, "mlp_ratio": 2}
        return tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig(
            text_config=text_config, vision_config=vision, **IDS
        )
    if name == "qwen2_5_vl":
        # Windows of 2 x 2 tokens, and a block with windows behind the one with full attention.
        vision = {
            **VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": width,
            "window_size": 2 * MERGE * PATCH, "fullatt_block_indexes": [0, 1], "tokens_per_second": 2,
        }  # fmt: skip
        return tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig(
            text_config=text_config, vision_config=vision, **IDS
        )
    # DeepStack adds to the first three of four decoder layers: in front of and behind the pruning layers.
    vision = {
        **VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": width, "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    text_config |= {"head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    return tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig(text_config=text_config, vision_config=vision, **IDS)


def model(name: str, attention: str = "sdpa") -> Any:
    kind, config = _config(name)
    torch.manual_seed(11)
    made = kind(config).eval()
    made.set_attn_implementation(attention)
    return made


def _knows_frames(made: Any) -> bool:
    """Whether Qwen3-VL finds several frames of one video in the prompt; transformers 5.3 runs out of grids."""
    ids = torch.tensor([[VIDEO, 5, VIDEO]])
    try:
        made.model.get_rope_index(
            ids, mm_token_type_ids=2 * (ids == VIDEO).long(), video_grid_thw=torch.tensor([[2, MERGE, MERGE]])
        )
    except StopIteration:
        return False
    return True


Grid = tuple[int, int, int]  # frames, patches down, patches across, as in image_grid_thw
Part = int | Grid | tuple[str, Grid] | list[int]  # text tokens, an image, ("video", grid), or ids as they are


def prompts(made: Any, samples: list[list[Part]], seed: int = 3) -> Prompts:
    """A batch from its parts: an int is that much text, a grid an image, ("video", grid) a video, a list these ids."""
    draw = torch.Generator().manual_seed(seed)
    stamps = made.config.model_type in STAMPED
    images, videos, ids = [], [], []
    for sample in samples:
        tokens: list[int] = []
        for part in sample:
            if isinstance(part, int):
                tokens += text(part, draw)
                continue
            if isinstance(part, list):
                tokens += part
                continue
            grid = part[1] if part[0] == "video" else part
            frame = grid[1] * grid[2] // MERGE**2
            if part[0] != "video":
                images.append(grid)
                tokens += [VISION_START] + [IMAGE] * frame + [VISION_END]
            elif stamps:  # the time in front of every frame
                videos += [grid] if _knows_frames(made) else [(1, *grid[1:])] * grid[0]
                for _ in range(grid[0]):
                    tokens += [*text(2, draw), VISION_START] + [VIDEO] * frame + [VISION_END]
            else:
                videos.append(grid)
                tokens += [VISION_START] + [VIDEO] * frame * grid[0] + [VISION_END]
        ids.append(tokens)
    inputs = left_padded(ids)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long() + 2 * (inputs["input_ids"] == VIDEO).long()
    for key, pixels, grids in (
        ("image_grid_thw", "pixel_values", images), ("video_grid_thw", "pixel_values_videos", videos),
    ):  # fmt: skip
        if grids:
            inputs[key] = torch.tensor(grids)
            patches = sum(t * h * w for t, h, w in grids)
            inputs[pixels] = torch.randn(patches, CHANNELS * TIMES * PATCH**2, generator=draw)
    return Prompts(made, inputs, (IMAGE, VIDEO), (VISION_START, VISION_END))
