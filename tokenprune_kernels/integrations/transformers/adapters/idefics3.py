"""Idefics3 and SmolVLM: tiles, and a thumbnail, each pixel-shuffled; frames; no class token."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout, Patches, grid_patches, layout_of
from .images import by_sample, encoded_with
from .tiles import check_rows, stretches, tile_patches
from .towers import attention_in, mean_attention


@dataclass(frozen=True)
class Tiles:
    """What `get_image_features` was called with: the sides of all tiles, and whether all pixels of those count.

    A sample with fewer tiles than another is padded with tiles of which no pixel counts.
    """

    height: int
    width: int
    full: Tensor  # bool, on the device

    @classmethod
    def seen(cls, arguments: Inputs) -> "Tiles":
        pixels, mask = arguments["pixel_values"], arguments.get("pixel_attention_mask")
        full = torch.ones((), dtype=torch.bool, device=pixels.device)
        if mask is not None:
            counted = mask.flatten(2).bool()
            full = (counted.all(2) | ~counted.any(2)).all()
        height, width = pixels.shape[-2:]
        return cls(height, width, full)


def _tiles_seen(inputs: Inputs) -> Tiles:
    (seen,) = encoded_with(inputs, "get_image_features")
    if seen.height != seen.width:  # the pixel shuffle takes what it gets for a square
        raise NotImplementedError(f"prune_visual_tokens: tiles must be square, got {seen.height} x {seen.width} pixels")
    if not bool(seen.full):
        raise NotImplementedError(
            "prune_visual_tokens: pixel_attention_mask masks a part of a tile, whose visual tokens are no grid then; "
            "let the processor resize tiles to their full size"
        )
    found: Tiles = seen
    return found


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Every tile and every frame is a group of its own."""
    vision = core.config.vision_config
    side = _tiles_seen(inputs).height // vision.patch_size // core.config.scale_factor
    samples = []
    for ids in inputs["input_ids"].tolist():
        patches: list[Patches] = []
        for image, rows in enumerate(rows_of(ids, core.config.image_token_id, side * side)):
            patches += [*tile_patches(*check_rows(rows), side, image), grid_patches(side, side, image)]
        samples.append(patches)
    return layout_of(samples, max(counts, default=0))


def rows_of(ids: list[int], token: int, length: int) -> list[list[int]]:
    """Of each image in a prompt, how many tiles there are in each row, without the thumbnail, which is last.

    The processor writes F x for a tile and for the thumbnail, behind which F stands once more, and a line break behind
    each row. F is the tokenizer's own id, the second in front of every tile, and x is another one for each tile.
    """
    starts = stretches(ids, token, length)
    if len({ids[start - 2] for start in starts}) > 1 or (starts and starts[0] < 2):
        raise NotImplementedError(
            "prune_visual_tokens: the tiles of an image are not preceded by the same two tokens as the processor "
            "writes, which tell how they are arranged"
        )
    images: list[list[int]] = []
    for number, start in enumerate(starts):
        fence = ids[start - 2]
        between = ids[starts[number - 1] + length : start] if number else [fence]
        if between[0] != fence:
            images[-1].append(1)
        elif number and len(between) == 2:
            images[-1][-1] += 1
        else:
            images.append([1])
    for rows in images:
        if rows[-1] != 1:
            raise NotImplementedError(
                "prune_visual_tokens: tiles without a thumbnail behind them, which the processor adds"
            )
    return [rows[:-1] for rows in images]


def attention(core: Model) -> nn.Module:
    return attention_in(core.vision_model, -1)


def shuffled_scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """Averaged over the patches that the pixel shuffle makes one token of."""
    patches = mean_attention(query, key, scale).unsqueeze(-1)
    shuffled: Tensor = core.connector.pixel_shuffle(patches, core.config.scale_factor)
    return shuffled.mean(-1).flatten()


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    _tiles_seen(inputs)
    return by_sample(torch.cat(seen), counts)


_IDEFICS3 = Family(
    name="Idefics3",
    model_types=("idefics3",),
    layout=layout,
    grid="tiles, in the rows that the prompt has, and a thumbnail, after the pixel shuffle; a group per "
    "tile or frame",
    saliency=Saliency(
        "mean attention received in the last layer, its mean over the patches of a token",
        attention, shuffled_scores, saliency,
    ),
    decoder=lambda core: core.text_model,
    watched={"get_image_features": Tiles.seen},
)  # fmt: skip

FAMILIES = (_IDEFICS3, replace(_IDEFICS3, name="SmolVLM", model_types=("smolvlm",)))
