"""Layouts made by hand, token for token, and what a block has made instead."""

from typing import Any

import torch
from torch import Tensor

from tokenprune_kernels.integrations.transformers import prune_visual_tokens

from .models import Prompts
from .runs_crops import generate, layout_in, pruned

Token = tuple[Any, ...]  # row, column, grid, group, image, box


def layout_for(prompts: Prompts) -> Any:
    with pruned(prompts, "random", 3) as pruning:
        generate(prompts, 1)
    return layout_in(pruning)


def check_layout(layout: Any, b: int, expected: list[Token]) -> None:
    """Of sample b."""
    names = ("positions", "grids", "groups", "images", "boxes")
    found = [getattr(layout, name)[b][: len(expected)].double() for name in names]
    rows = [((r, c), grid, group, image, box) for r, c, grid, group, image, box in expected]
    for name, value, wanted in zip(names, found, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(
            value, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6, equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


def whole(grid: int | tuple[int, int], group: int, image: int, part: float = 1.0) -> list[Token]:
    """A grid that sees all of an image, or its upper left part; a number is the side of a square."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    down, right = part / rows, part / columns
    return [
        (r, c, (rows, columns), group, image, (c * right, r * down, (c + 1) * right, (r + 1) * down))
        for r in range(rows)
        for c in range(columns)
    ]


def tiles(rows: int, columns: int, group: int, image: int) -> list[Token]:
    """Of 4 x 4 tokens, row after row."""
    tokens: list[Token] = []
    for i in range(rows):
        for j in range(columns):
            for r, c, grid, _, _, (left, top, right, bottom) in whole(4, 0, 0):
                box = ((j + left) / columns, (i + top) / rows, (j + right) / columns, (i + bottom) / rows)
                tokens.append((r, c, grid, group + i * columns + j, image, box))
    return tokens


def wide_crops(group: int, image: int) -> list[Token]:
    """20 x 44 pixels in a thumbnail and three crops of 5 x 5 patches; the image is 11 of 15 wide, of 2 to 13."""
    tokens = whole(5, group, image)
    for r in range(5):
        for x in range(2, 13):
            box = ((x - 2) / 11, r / 5, (x - 1) / 11, (r + 1) / 5)
            tokens.append((r, x % 5, (5, 5), group + 1 + x // 5, image, box))
        tokens.append((r, 3, (5, 5), group + 3, image, (1.0, r / 5, 1.0, (r + 1) / 5)))
    return tokens


def seen_by_methods(prompts: Prompts) -> tuple[Tensor, Any]:
    """The saliency that a method in front of the language model gets, and the layout."""
    given: list[Tensor] = []

    def spied(saliency: Tensor, positions: Tensor, k: int) -> Tensor:
        given.append(saliency)
        return torch.arange(k).expand(len(saliency), -1)

    with torch.no_grad(), prune_visual_tokens(prompts.model, spied, 5) as pruning:
        prompts.model(**prompts.inputs)
    return given[0], layout_in(pruning)


def assert_salient(row: Tensor, exact: Tensor) -> None:
    """A sample's: not the same for all tokens, and 0 in the padding."""
    torch.testing.assert_close(row[: len(exact)].double(), exact.double(), rtol=1e-4, atol=1e-7)
    assert (row[len(exact) :] == 0).all()
    assert exact.max() > 1.02 * exact.min()
