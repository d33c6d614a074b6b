"""Checkpoints that the engine loads: the repository's small LLaVA by other names, and small random models of others.

The engine knows the towers of LLaVAs by the module names that transformers had before 5.11, and what transformers
writes now has other ones.
"""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from testing import ROOT

TINY = ROOT / "studies" / "models" / "tiny-llava-vqa"
SIDE, PATCH = 112, 14  # of the crops of the random models, in pixels


def engine_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LLaVA's weights by the engine's names: `vision_tower.` is followed by `vision_model.`."""
    tower = "vision_tower."
    return {
        name if f"{tower}vision_model." in name else name.replace(tower, f"{tower}vision_model."): weight
        for name, weight in weights.items()
    }


def convert(source: Path, target: Path) -> Path:
    """Writes a checkpoint folder of a LLaVA, with its processor, once more with names that the engine knows."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, target)
    weights = engine_names(load_file(source / "model.safetensors"))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def text_config(kind: type) -> Any:
    """Wide enough initial weights that answers depend on which visual tokens are kept."""
    return kind(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=72, max_position_embeddings=2048, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def tokenizer(*special: str) -> Any:
    """The small model's, with further tokens behind its 69."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(TINY)
    words.add_special_tokens({"additional_special_tokens": ["<image>", *special]})
    return words


def save(model: Any, processor: Any, target: Path) -> Path:
    """For transformers in target/transformers, for the engine in target/engine."""
    model.save_pretrained(target / "transformers")
    processor.chat_template = (TINY / "chat_template.jinja").read_text()
    processor.save_pretrained(target / "transformers")
    return target


def llava_next(target: Path) -> Path:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=64, initializer_factor=3.0,
    )  # fmt: skip
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(
        vision_config=vision, text_config=text_config(LlamaConfig), image_token_index=4, image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2, image_seq_length=(SIDE // PATCH) ** 2,
    )  # fmt: skip
    torch.manual_seed(0)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return save(LlavaNextForConditionalGeneration(config), processor, target)


def llava_onevision(target: Path) -> Path:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    words = tokenizer("<video>")
    pinpoints = [[a * SIDE, b * SIDE] for a in range(1, 5) for b in range(1, 5)]
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text_config(Qwen2Config), image_token_index=4,
        video_token_index=words.convert_tokens_to_ids("<video>"), image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    images = LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints)
    videos = LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE})
    processor = LlavaOnevisionProcessor(
        images, words, videos, num_image_tokens=(SIDE // PATCH) ** 2, vision_feature_select_strategy="full"
    )
    return save(LlavaOnevisionForConditionalGeneration(config), processor, target)


def qwen(target: Path, name: str) -> Path:
    """name: of the classes of transformers, Qwen2VL, Qwen2_5_VL or Qwen3VL."""
    import transformers

    specials = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*specials)
    ids = dict(
        zip(("vision_start", "vision_end", "image", "video"), words.convert_tokens_to_ids(specials), strict=True)
    )
    rotary = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    if name == "Qwen3VL":
        rotary["mrope_interleaved"] = True
    vision = {"patch_size": 14, "initializer_range": 0.1, "depth": 3, "num_heads": 2}
    if name == "Qwen2VL":
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64}
    if name == "Qwen2_5_VL":
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    if name == "Qwen3VL":
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 256}
    text = text_config(transformers.Qwen2Config).to_dict()
    text = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id",
            "bos_token_id", "eos_token_id")}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config={**text, "vocab_size": 80, "head_dim": 32, "rope_parameters": rotary},
        **{f"{kind}_token_id": number for kind, number in ids.items()},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    images = transformers.Qwen2VLImageProcessor(patch_size=14, min_pixels=28 * 28, max_pixels=448 * 448)
    videos = getattr(transformers, "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor")()
    processor = getattr(transformers, f"{name}Processor")(images, words, videos)
    return save(model, processor, target)


def llava(target: Path) -> Path:
    shutil.copytree(TINY, target / "transformers")
    return target


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "LLaVA-1.5": llava, "LLaVA-NeXT": llava_next, "LLaVA-OneVision": llava_onevision,
    "Qwen2.5-VL": partial(qwen, name="Qwen2_5_VL"), "Qwen3-VL": partial(qwen, name="Qwen3VL"),
    "Qwen2-VL": partial(qwen, name="Qwen2VL"),  # which the plug-in does not serve
}  # fmt: skip


def written(family: str, folder: Path) -> Path:
    """The folder of a family's checkpoints, transformers/ and engine/, written the first time it is asked for."""
    target = folder / family
    if not (target / "engine").exists():
        shutil.rmtree(target, ignore_errors=True)
        convert(FAMILIES[family](target) / "transformers", target / "engine")
    return target


if __name__ == "__main__":
    for each in FAMILIES:
        written(each, Path(sys.argv[1]))
