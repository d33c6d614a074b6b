"""Checkpoints on disk for the demo: small random models, each with a processor made here, without a download."""

import json
from pathlib import Path
from typing import Any

from . import models, models_crops, models_qwen
from .models import IMAGE

VOCABULARY = models.TEXT["vocab_size"]
KNOWN = ("is", "there", "a", "cat", "what", "?")
LLAVA = {IMAGE: "<image>"}
QWEN = {100: "<|image_pad|>", 101: "<|video_pad|>", 102: "<|vision_start|>", 103: "<|vision_end|>"}


def chat(image: str) -> str:
    """A chat template: the image as it stands in a prompt, then the question."""
    return (
        "{% for message in messages %}{% for part in message['content'] %}"
        f"{{{{ '{image}' if part['type'] == 'image' else ' ' + part['text'] }}}}"
        "{% endfor %}{% endfor %}"
    )


def tokenizer(placeholders: dict[int, str]) -> Any:
    """One token per word: those of KNOWN, and w10, w11, ... for all ids that have no other name."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", **dict(enumerate(KNOWN, 4)), **placeholders}
    words = Tokenizer(kinds.WordLevel({names.get(n, f"w{n}"): n for n in range(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(placeholders.values()), padding_side="left",
    )  # fmt: skip


def llava(folder: Path, *, template: bool = True, crop: bool = False) -> Path:
    """36 visual tokens. crop: as the processor of LLaVA-1.5, which cuts the middle square out."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"shortest_edge": 24} if crop else {"height": 24, "width": 24}
    images = CLIPImageProcessor(size=size, crop_size={"height": 24, "width": 24}, do_center_crop=crop)
    processor = LlavaProcessor(
        images, tokenizer(LLAVA), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>") if template else None,
    )  # fmt: skip
    models.llava().model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_next(folder: Path) -> Path:
    """A thumbnail of 4 x 4 tokens, crops, and newlines."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    model = models_crops.llava_next().model
    side = {"height": 16, "width": 16}
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=side, image_grid_pinpoints=model.config.image_grid_pinpoints
    )
    processor = LlavaNextProcessor(
        images, tokenizer(LLAVA), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen2_5_vl(folder: Path) -> Path:
    """Written by hand where transformers writes it from a processor of videos, which takes torchvision."""
    models_qwen.model("qwen2_5_vl").save_pretrained(folder)
    tokenizer(QWEN).save_pretrained(folder)
    common = {
        "patch_size": models_qwen.PATCH, "temporal_patch_size": models_qwen.TIMES, "merge_size": models_qwen.MERGE,
        "size": {"shortest_edge": 400, "longest_edge": 3200},
    }  # fmt: skip
    parts = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": {**common, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {**common, "video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(parts))
    (folder / "preprocessor_config.json").write_text(json.dumps(parts["image_processor"]))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(parts["video_processor"]))
    (folder / "chat_template.jinja").write_text(chat("<|vision_start|><|image_pad|><|vision_end|>"))
    return folder
