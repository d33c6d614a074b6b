"""Small random Idefics3, SmolVLM and Ovis2 models, and prompts whose tiles are arranged by the tokens between them.

An image is the number of rows and columns of its tiles; (0, 0): it is not split, as a frame of a video.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .models import IMAGE, PAD, TEXT, Prompts, left_padded, text
from .models_crops import noise, random_model

SIDE, PATCH, MERGE = 16, 2, 2  # pixels of a tile and of a patch, and patches in a row of a token
TOKENS = 16  # of a tile, 4 x 4
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
Images = Sequence[Sequence[tuple[int, int]]]
# An image of 1 x 2 tiles and one that is not split, against one of 2 x 1.
RAGGED: Images = [[(1, 2), (0, 0)], [(2, 1)]]
FRAMES: Images = [[(0, 0)] * 3, [(2, 2)]]
BREAK, BREAKS = 91, 92  # behind a row; "\n\n" is one token to some tokenizers
FENCE, GLOBAL, FIRST = 102, 103, 104  # <fake_token_around_image>, <global-img>, <row_1_col_1>
START, GRID, COLUMN, ROW, END = INDICATORS = (102, 103, 104, 105, 106)


def fenced(rows: int, columns: int, merged: bool = True) -> list[int]:
    """An image in a prompt, as Idefics3Processor and SmolVLMProcessor write it."""
    ids: list[int] = []
    for r in range(rows):
        for c in range(columns):
            ids += [FENCE, FIRST + r * columns + c] + [IMAGE] * TOKENS
        ids += [BREAK] if r < rows - 1 else [BREAKS] if merged else [BREAK, BREAK]
    return [*ids, FENCE, GLOBAL, *[IMAGE] * TOKENS, FENCE]


def indicated(rows: int, columns: int) -> list[int]:
    """As Ovis2Processor writes it."""
    tile = [IMAGE] * TOKENS
    ids = [START, *tile, GRID]
    for r in range(rows):
        for c in range(columns):
            ids += [*tile, *([COLUMN] if c < columns - 1 else [])]
        ids += [ROW] if r < rows - 1 else []
    return [*ids, END]


def _ids(images: Images, write: Any, draw: torch.Generator) -> dict[str, Tensor]:
    samples = []
    for b, sample in enumerate(images):
        ids = text(3, draw)
        for number, (rows, columns) in enumerate(sample):
            ids += [*write(rows, columns), *text(number, draw)]  # nothing behind the first
        samples.append(ids + text(4 + 2 * b, draw))
    return left_padded(samples)


@functools.cache
def _fenced_model(name: str) -> Any:
    import transformers as tf

    config = getattr(tf, f"{name}Config")(
        vision_config=getattr(tf, f"{name}VisionConfig")(**VISION), text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE, scale_factor=MERGE, pad_token_id=PAD,
    )  # fmt: skip
    return random_model(getattr(tf, f"{name}ForConditionalGeneration"), config, "sdpa")


def _fenced(name: str, images: Images) -> Prompts:
    draw = torch.Generator().manual_seed(3)
    tiles = [sum(rows * columns + 1 for rows, columns in sample) for sample in images]
    most = max(tiles)
    # Samples are padded with tiles of zeros.
    pixels = torch.stack([torch.cat([noise(n, SIDE, draw), torch.zeros(most - n, 3, SIDE, SIDE)]) for n in tiles])
    mask = (torch.arange(most) < torch.tensor(tiles).unsqueeze(1)).long()[..., None, None].expand(-1, -1, SIDE, SIDE)
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask.contiguous()}
    return Prompts(_fenced_model(name), {**_ids(images, fenced, draw), **inputs}, IMAGE)


def idefics3(images: Images = RAGGED) -> Prompts:
    return _fenced("Idefics3", images)


def smolvlm(images: Images = RAGGED) -> Prompts:
    return _fenced("SmolVLM", images)


def idefics3_frames() -> Prompts:
    return idefics3(FRAMES)


def smolvlm_frames() -> Prompts:
    return smolvlm(FRAMES)


@functools.cache
def _ovis2_model() -> Any:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2VisionConfig, Qwen2Config

    config = Ovis2Config(
        vision_config=Ovis2VisionConfig(**VISION, hidden_stride=MERGE, vocab_size=50), text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE, visual_indicator_token_ids=INDICATORS, vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"], tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(Ovis2ForConditionalGeneration, config, "sdpa")


def ovis2(images: Images = RAGGED) -> Prompts:
    draw = torch.Generator().manual_seed(3)
    tiles = sum(rows * columns + 1 for sample in images for rows, columns in sample)
    # In decoding, the model leaves a generated indicator its text embedding.
    return Prompts(
        _ovis2_model(), {**_ids(images, indicated, draw), "pixel_values": noise(tiles, SIDE, draw)}, IMAGE, INDICATORS
    )
