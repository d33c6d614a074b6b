"""Where visual tokens lie: on the grids of images, crops and frames, and on the image that they see parts of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of a batch lie, on the host. V is the largest number of a sample; the rest is padding.

    positions [B, V, 2]: row and column on the token's own grid, NaN if it is on none. grids [B, V, 2]: that grid's
    height and width.
    groups [B, V] int64: crop or frame of a token, numbered through the sample. images [B, V] int64: which image of
    the sample. boxes [B, V, 4]: left, top, right, bottom of what the token sees, in parts of its image.
    """

    positions: Tensor
    grids: Tensor
    groups: Tensor
    images: Tensor
    boxes: Tensor


def check_on_grid(layout: Layout, method: str) -> None:
    """Whether every token has a position for a method that asks for them."""
    if bool(layout.positions.isnan().any()):
        raise NotImplementedError(
            f"prune_visual_tokens: {method} needs the position of every visual token on a grid, and the class tokens "
            "among them are on none"
        )


def images_of(layout: Layout, counts: list[int]) -> list[list[int]]:
    """The visual tokens of each image or frame, by sample. They lie one behind the other, as in the prompt."""
    rows = zip(layout.images, counts, strict=True)
    return [row[:count].unique_consecutive(return_counts=True)[1].tolist() for row, count in rows]


@dataclass
class Patches:
    """The tokens of one image, crop or frame on a grid, or of several crops whose rows are packed together.

    A token that sees nothing (a newline) has a box without width.
    """

    positions: Tensor  # [V, 2]
    grid: tuple[float, float]
    boxes: Tensor  # [V, 4]
    image: int
    crops: Tensor | None = None  # [V] int64: the token's crop, counted from 0 among these; None: it is one crop


def grid_patches(height: int, width: int, image: int, area: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> Patches:
    """A full grid in raster order over an area of its image."""
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    left, top, right, bottom = area
    step_x, step_y = (right - left) / width, (bottom - top) / height
    boxes = torch.stack(
        [left + column * step_x, top + row * step_y, left + (column + 1) * step_x, top + (row + 1) * step_y], 1
    )
    return Patches(torch.stack([row, column], 1).float(), (height, width), boxes.float(), image)


def layout_of(samples: Sequence[Sequence[Patches]], most: int) -> Layout:
    """The layout of a batch from the crops of each sample, in the order of the prompt, padded to `most` tokens."""
    batch = len(samples)
    layout = Layout(
        torch.zeros(batch, most, 2), torch.ones(batch, most, 2), torch.zeros(batch, most, dtype=torch.int64),
        torch.zeros(batch, most, dtype=torch.int64), torch.zeros(batch, most, 4),
    )  # fmt: skip
    for b, crops in enumerate(samples):
        start = group = 0
        for crop in crops:
            here = slice(start, start + len(crop.positions))
            layout.positions[b, here] = crop.positions
            layout.grids[b, here] = torch.tensor(crop.grid, dtype=torch.float32)
            layout.groups[b, here] = group if crop.crops is None else group + crop.crops
            layout.images[b, here] = crop.image
            layout.boxes[b, here] = crop.boxes
            start = here.stop
            group += 1 if crop.crops is None else int(crop.crops.max()) + 1
    return layout
