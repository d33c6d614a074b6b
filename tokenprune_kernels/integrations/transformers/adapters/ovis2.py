"""Ovis2: a thumbnail of an image and its tiles, with indicator tokens of the model between them; no class token."""

from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout, Patches, grid_patches, layout_of
from .images import by_sample
from .tiles import check_rows, stretches, tile_patches
from .towers import attention_in, mean_attention, window_means


def _sides(core: Model) -> tuple[int, int]:
    """Patches and visual tokens in a row of a tile, which the tower's position embeddings fix."""
    vision = core.config.vision_config
    side, stride = vision.image_size // vision.patch_size, vision.hidden_stride
    if side % stride:
        raise NotImplementedError(
            f"prune_visual_tokens: {side} patches in a row of a tile, and {stride} of them make a visual token: the "
            "last one is padded"
        )
    return side, side // stride


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """The thumbnail and every tile are groups of their own."""
    _, side = _sides(core)
    config = core.config
    samples = []
    for ids in inputs["input_ids"].tolist():
        patches: list[Patches] = []
        every = rows_of(ids, config.image_token_id, side * side, config.visual_indicator_token_ids)
        for image, rows in enumerate(every):
            patches += [grid_patches(side, side, image), *tile_patches(*check_rows(rows), side, image)]
        samples.append(patches)
    return layout_of(samples, max(counts, default=0))


def rows_of(ids: list[int], token: int, length: int, indicators: list[int]) -> list[list[int]]:
    """Of each image in a prompt, how many tiles there are in each row, without the thumbnail, which is first.

    The processor writes one indicator in front of the thumbnail, in front of the tiles, between tiles of a row, and
    between rows: the first four of the model's own.
    """
    thumbnail, grid, column, row = indicators[:4]
    images: list[list[int]] = []
    for start in stretches(ids, token, length):
        before = ids[start - 1] if start else None
        if before == thumbnail:
            images.append([])
        elif before in (grid, row) and images:
            images[-1].append(1)
        elif before == column and images and images[-1]:
            images[-1][-1] += 1
        else:
            raise NotImplementedError(
                f"prune_visual_tokens: a tile behind token {before}, and not behind one of the "
                "visual_indicator_token_ids that tell how tiles are arranged"
            )
    return images


def attention(core: Model) -> nn.Module:
    return attention_in(core.vision_tower.transformer, -1)


def scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """Averaged over the patches of a token."""
    side, tokens = _sides(core)
    return window_means(mean_attention(query, key, scale), side, side // tokens).flatten()


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    return by_sample(torch.cat(seen), counts)


FAMILIES = (
    Family(
        name="Ovis2",
        model_types=("ovis2",),
        layout=layout,
        grid="a thumbnail and tiles, in the rows that the prompt's indicator tokens say, a group each",
        saliency=Saliency(
            "mean attention received in the last layer, its mean over the patches of a token",
            attention, scores, saliency,
        ),
    ),
)  # fmt: skip
