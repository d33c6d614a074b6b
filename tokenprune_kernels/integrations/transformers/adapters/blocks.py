"""Images of any size, whose patches leave the tower row by row, and become a token block by block (Mistral 3, LFM2-VL).

The last row or column of patches is left out where it has no partner.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..layout import Patches, grid_patches

Grid = tuple[int, int]  # rows and columns of an image, in patches


def blocks(grids: Sequence[Grid], side: int) -> list[list[Patches]]:
    """The tokens of each image, for `images.layout_of_images`. side: patches along a side of a block."""
    return [
        [
            grid_patches(
                height // side,
                width // side,
                0,
                (0.0, 0.0, width // side * side / width, height // side * side / height),
            )
        ]
        for height, width in grids
    ]


def block_means(values: Sequence[Tensor], grids: Sequence[Grid], side: int) -> list[Tensor]:
    """A value per token of each image, from a vector of one per patch, for `images.values_of_images`."""
    return [avg_pool2d(each.view(1, *grid).float(), side).flatten() for each, grid in zip(values, grids, strict=True)]
