"""InternVL3 and Qianfan-OCR: tiles of an image and a thumbnail of all of it, each pixel-shuffled; a tower with a class
token."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout, Patches, grid_patches, layout_of
from .images import beam_copies, by_sample, encoded_with
from .tiles import tile_patches
from .towers import attention_of, patch_scores


@dataclass(frozen=True)
class Tiles:
    """What `get_image_features` was called with: the sides of all tiles, and the tiles, smaller."""

    height: int
    width: int
    small: Tensor  # [tiles, 3, h, w]

    @classmethod
    def seen(cls, arguments: dict[str, Any]) -> "Tiles":
        pixels: Tensor = arguments["pixel_values"]
        height, width = pixels.shape[-2:]
        return cls(height, width, adaptive_avg_pool2d(pixels.detach().float(), (min(24, height), min(24, width))))


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """A stretch of visual tokens is an image: one tile or frame, or several tiles and the thumbnail behind them."""
    (seen,) = encoded_with(inputs, "get_image_features")
    if seen.height != seen.width:  # the pixel shuffle takes what it gets for a square
        raise NotImplementedError(f"prune_visual_tokens: tiles must be square, got {seen.height} x {seen.width} pixels")
    side = int(seen.height // core.config.vision_config.patch_size[0] * core.config.downsample_ratio)
    columns = torch.nn.functional.pad((inputs["input_ids"] == core.config.image_token_id).long(), (1, 1))
    turns = columns.diff(dim=1).cpu()
    samples: list[list[Patches]] = []
    arranged: dict[int, tuple[int, int] | None] = {}  # by the first tile of an image
    # Beams of one sample share its tiles, when generate has repeated it after encoding.
    copies = beam_copies(len(seen.small) * side * side, counts)
    tile = 0
    for b, turn in enumerate(turns):
        patches: list[Patches] = []
        first_of_sample = tile
        starts, ends = (turn == 1).nonzero().flatten().tolist(), (turn == -1).nonzero().flatten().tolist()
        for image, (start, end) in enumerate(zip(starts, ends, strict=True)):
            tiles, rest = divmod(end - start, side * side)
            if rest:
                raise NotImplementedError(
                    f"prune_visual_tokens: the {end - start} visual tokens of an image are not a multiple of "
                    f"{side * side}, the tokens of a tile"
                )
            if tiles > 1:
                if tile not in arranged:
                    arranged[tile] = _arrangement(seen.small[tile : tile + tiles])
                patches += _tiles(arranged[tile], tiles - 1, side, image)
            patches.append(grid_patches(side, side, image))
            tile += tiles
        samples.append(patches)
        if (b + 1) % copies:
            tile = first_of_sample
    return layout_of(samples, max(counts, default=0))


def _tiles(arrangement: tuple[int, int] | None, count: int, side: int, image: int) -> list[Patches]:
    rows, columns = arrangement or (1, count)
    patches = tile_patches(rows, columns, side, image)
    return patches if arrangement else [replace(p, boxes=torch.full_like(p.boxes, torch.nan)) for p in patches]


def _arrangement(tiles: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the tiles, the last of which is the thumbnail; None where that cannot be told.

    The model is not told, and no method but only boxes depend on it. Put together rightly, the tiles look like the
    thumbnail, and clearly more so than in any other arrangement.
    """
    count = len(tiles) - 1
    candidates = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    if len(candidates) == 1:
        return candidates[0]
    found = []
    for rows, columns in candidates:
        whole = tiles[:-1].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        small = adaptive_avg_pool2d(whole, (tiles.shape[-2], tiles.shape[-1]))
        found.append((float((small - tiles[-1]).square().mean()), (rows, columns)))
    (best, arrangement), (second, _), *_ = sorted(found)
    return arrangement if best < second / 2 else None


def shuffled_scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """Averaged over the patches that the pixel shuffle makes one token of."""
    scores = patch_scores(core, query, key, scale)
    side = round(scores.shape[1] ** 0.5)  # as the model counts, whose tiles are square
    patches = scores.unflatten(1, (side, side)).unsqueeze(-1)
    shuffled: Tensor = core.pixel_shuffle(patches, scale_factor=core.config.downsample_ratio)
    return shuffled.mean(-1).flatten()


def saliency(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    return by_sample(torch.cat(seen), counts)


FAMILIES = (
    Family(
        name="InternVL3",
        model_types=("internvl", "qianfan_ocr"),
        layout=layout,
        grid="tiles and a thumbnail, after the pixel shuffle",
        saliency=Saliency("class token's row, mean of each 2 x 2 block", attention_of, shuffled_scores, saliency),
        watched={"get_image_features": Tiles.seen},
    ),
)
