"""Small random Molmo 2 models: images in two views, videos of frames, both pooled to tokens that see each other."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .models import IMAGE, TEXT, Prompts, left_padded, text
from .models_crops import random_model

SIDE, PATCH = 4, 4  # patches along a side of a crop, pooled 2 x 2, and pixels along one of a patch
COLUMN_END = 105
# An image in two crops, and one that is a crop in front of one in two.
RAGGED = [[(1, 2)], [(1, 1), (2, 1)]]
VISION = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}


@functools.cache
def model(olmo: bool) -> Any:
    """olmo: as the checkpoint with OLMo, which norms behind its attention, and rotates its layers in two ways."""
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    language = {**TEXT, "head_dim": 16, "additional_vocab_size": 8}
    if olmo:
        language |= {
            "norm_after": True, "qk_norm_type": "olmo", "rope_scaling_layers": [1, 3],
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        }  # fmt: skip
    config = Molmo2Config(
        text_config=language,
        vision_config={
            **VISION, "intermediate_size": 48, "num_hidden_layers": 3, "image_size": [PATCH * SIDE] * 2,
            "patch_size": PATCH,
        },
        adapter_config={
            **VISION, "vision_feature_layer": [2, 0], "intermediate_size": 48, "text_hidden_size": TEXT["hidden_size"],
        },
        image_patch_id=IMAGE, image_start_token_id=101, image_end_token_id=102, low_res_image_start_token_id=103,
        frame_start_token_id=104, frame_end_token_id=106,
    )  # fmt: skip
    return random_model(Molmo2ForConditionalGeneration, config, "sdpa")


def windows(patches: Tensor) -> tuple[Tensor, list[int]]:
    """[tokens, 4]: which patches [rows, columns] each token is pooled of, -1 for none; and the grid of tokens.

    The processor pads an odd number of rows or columns by one behind them.
    """
    padded = torch.nn.functional.pad(patches, (0, patches.shape[1] % 2, 0, patches.shape[0] % 2), value=-1)
    tokens = padded.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(0, 2, 1, 3)
    return tokens.flatten(2).flatten(0, 1), list(tokens.shape[:2])


def whole(first: int) -> Tensor:
    """The patches of a crop that sees all of an image, or of a frame, from number `first` on."""
    return first + torch.arange(SIDE**2).view(SIDE, SIDE)


def together(down: int, across: int, first: int) -> Tensor:
    """The patches of crops that are put together, without the row and the column that the crop before has seen."""
    index = first + torch.arange(down * across * SIDE**2).view(down, across, SIDE, SIDE)
    index[1:, :, 0], index[:, 1:, :, 0] = -1, -1
    index = index.permute(0, 2, 1, 3).flatten()
    return index[index >= 0].view(down * (SIDE - 1) + 1, across * (SIDE - 1) + 1)


def _in_rows(rows: int, columns: int) -> list[int]:
    return ([IMAGE] * columns + [COLUMN_END]) * rows


def prompts(samples: Sequence[Sequence[tuple[int, int]]], olmo: bool = False) -> Prompts:
    """An image is how many crops it has, down and across."""
    draw = torch.Generator().manual_seed(3)
    ids: list[list[int]] = []
    grids, pooling, crops = [], [], 0
    for b, sample in enumerate(samples):
        ids.append(text(3, draw))
        for i, (down, across) in enumerate(sample):
            first = crops * SIDE**2
            (low, small), (high, large) = windows(whole(first)), windows(together(down, across, first + SIDE**2))
            pooling += [low, high]
            grids.append([*small, *large])
            ids[-1] += [103, *_in_rows(*small), 102, 101, *_in_rows(*large), 102, *text(2 + i, draw)]
            crops += 1 + down * across
        ids[-1] += text(4 + 2 * b, draw)
    views = {"image_token_pooling": torch.cat(pooling), "image_grids": torch.tensor(grids)}
    return _prompts(olmo, ids, {**views, "pixel_values": _pixels(crops, draw)})


def _pixels(crops: int, draw: torch.Generator) -> Tensor:
    return torch.rand(crops, SIDE**2, 3 * PATCH**2, generator=draw)


def _prompts(olmo: bool, ids: list[list[int]], views: dict[str, Tensor]) -> Prompts:
    inputs = left_padded(ids)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return Prompts(model(olmo), {**inputs, **views}, IMAGE, special=tuple(range(101, 107)))


def images() -> Prompts:
    return prompts(RAGGED)


def olmo() -> Prompts:
    return prompts(RAGGED, olmo=True)


def videos() -> Prompts:
    """A video of three frames, and one of two."""
    draw = torch.Generator().manual_seed(3)
    frames = [3, 2]
    made = [windows(whole(frame * SIDE**2)) for frame in range(sum(frames))]
    ids = []
    for b, count in enumerate(frames):
        stamped = [token for _ in range(count) for token in (*text(2, draw), 104, *_in_rows(*made[0][1]), 106)]
        ids.append([*text(3, draw), *stamped, *text(4 + 2 * b, draw)])
    views = {
        "video_token_pooling": torch.cat([tokens for tokens, _ in made]),
        "video_grids": torch.tensor([[count, *made[0][1]] for count in frames]),
    }
    return _prompts(False, ids, {**views, "pixel_values_videos": _pixels(sum(frames), draw)})
