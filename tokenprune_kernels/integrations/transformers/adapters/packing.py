"""Crops of a high-resolution image, packed row by row with newline tokens (LLaVA-NeXT, LLaVA-OneVision).

An image is a thumbnail of all of it and a canvas of crops. The model lays the crops side by side, cuts the padding
off, may shrink the result, and puts a newline token behind each row. Nothing of this is written down here once more:
the model's own `pack_image_features` packs coordinates, or a score of each patch, instead of features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from ..families import Model
from ..layout import Patches, grid_patches


@dataclass(frozen=True)
class Pack:
    """What `pack_image_features` was called with. crops: crops and patches of each image, instead of its features."""

    crops: list[tuple[int, int]]
    sizes: list[list[int]]
    arguments: dict[str, Any]

    @classmethod
    def seen(cls, arguments: dict[str, Any]) -> "Pack":
        others = dict(arguments)
        crops = [(len(t), t.shape[1]) for t in others.pop("image_features")]
        sizes = others.pop("image_sizes")
        others["image_newline"] = others.get("image_newline") is not None
        return cls(crops, sizes.tolist() if hasattr(sizes, "tolist") else [list(s) for s in sizes], others)

    def run(self, core: Model, features: Sequence[Tensor], newline: float) -> list[Tensor]:
        """[tokens, C] of each image from [crops, patches, C], by the model's code."""
        others = dict(self.arguments)
        filled = features[0].new_full(features[0].shape[-1:], newline) if others.pop("image_newline") else None
        method = type(core).pack_image_features  # not the one that is being watched
        packed, _ = method(core, image_features=features, image_sizes=self.sizes, image_newline=filled, **others)
        found: list[Tensor] = list(packed)
        return found


def packed_images(core: Model, pack: Pack) -> list[list[Patches]]:
    """The images in the order of the tower: of each, its thumbnail and its canvas of crops."""
    vision = core.config.vision_config
    side = vision.image_size // vision.patch_size
    row = torch.arange(side, dtype=torch.float64).repeat_interleave(side)
    column = torch.arange(side, dtype=torch.float64).repeat(side)
    canvases, coordinates = [], []
    for (crops, patches), size in zip(pack.crops, pack.sizes, strict=True):
        if patches != side * side:
            raise NotImplementedError(f"prune_visual_tokens: {patches} features of a crop with {side} x {side} patches")
        canvas = (0, 0)
        if crops > 1:
            height, width = select_best_resolution((size[0], size[1]), core.config.image_grid_pinpoints)
            canvas = (height // vision.image_size, width // vision.image_size)
        canvases.append(canvas)
        # Blending patches blends their coordinates: both are linear.
        crop = torch.arange(-1, crops - 1).clamp_min(0).unsqueeze(1)
        down, right = crop // max(canvas[1], 1) * side + row, crop % max(canvas[1], 1) * side + column
        coordinates.append(torch.stack([down, right], -1))
    packed = pack.run(core, coordinates, newline=-1.0)
    return [
        _image(tokens, canvas, side, size) for tokens, canvas, size in zip(packed, canvases, pack.sizes, strict=True)
    ]


def _image(tokens: Tensor, canvas: tuple[int, int], side: int, size: list[int]) -> list[Patches]:
    """tokens [V, 2]: row and column of each token on its canvas, in patches; -1 for a newline."""
    height, width = size
    if canvas == (0, 0):  # one of several images: no crops, the image is padded to a square
        return [_on_canvas(tokens, (1, 1), side, max(height, width) / side, size)]
    base = grid_patches(side, side, 0)  # squeezed into a square, not padded
    pixels = max(height / (canvas[0] * side), width / (canvas[1] * side))
    return [base, _on_canvas(tokens[side * side :], canvas, side, pixels, size)]


def _on_canvas(tokens: Tensor, canvas: tuple[int, int], side: int, pixels: float, size: list[int]) -> Patches:
    """pixels: how many of the image's are a patch. The image lies in the middle of its canvas."""
    newline = tokens[:, 0] < 0
    # A newline is beside the last token of its row: a column further right, in the same crop, and sees nothing.
    index = torch.arange(len(tokens))
    row, column = tokens[torch.where(newline, index - 1, index)].unbind(1)
    step = _step(tokens[~newline])
    crop_row = ((row + 0.5) / side).floor().clamp(0, canvas[0] - 1)
    crop_column = ((column + 0.5) / side).floor().clamp(0, canvas[1] - 1)
    own = torch.stack([row - crop_row * side, column - crop_column * side], 1)
    positions = (own + 0.5) / step - 0.5  # in tokens: the next token is 1 away, shrunk or not
    positions[:, 1] += newline
    extent = torch.tensor(size, dtype=torch.float64) / pixels
    margin = (torch.tensor(canvas, dtype=torch.float64) * side - extent) / 2
    centre = torch.stack([row, column], 1) + 0.5 - margin
    first, last = (((centre + sign * step / 2) / extent).clamp(0, 1) for sign in (-1, 1))
    boxes = torch.cat([first.flip(1), last.flip(1)], 1)  # left, top, right, bottom
    boxes[newline, 0] = boxes[newline, 2]
    crops = (crop_row * canvas[1] + crop_column).long()
    height, width = (side / step).tolist()
    return Patches(positions.float(), (height, width), boxes.float(), 0, crops)


def _step(tokens: Tensor) -> Tensor:
    """[2]: patches from a token to the next one below and to the right, more than 1 where they were shrunk."""
    row, column = tokens.unbind(1)
    columns = int((row - row[0]).abs().lt(1e-6).sum())
    rows = len(tokens) // columns
    down = float(row[-1] - row[0]) / (rows - 1) if rows > 1 else 0.0
    right = float(column[columns - 1] - column[0]) / (columns - 1) if columns > 1 else 0.0
    return torch.tensor([down or right or 1.0, right or down or 1.0], dtype=torch.float64)


def packed_scores(core: Model, pack: Pack, scores: Tensor) -> list[Tensor]:
    """One value per token of each image from [crops, patches] scores of all of them; 0 for a newline."""
    crops = scores.float().split([crops for crops, _ in pack.crops])
    return [t.squeeze(-1) for t in pack.run(core, [c.unsqueeze(-1) for c in crops], newline=0.0)]
