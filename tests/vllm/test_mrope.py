"""Positions of kept tokens on three axes: those that they had among all, whatever chunks a prompt comes in."""

import pytest
import torch
from torch import Tensor

from tokenprune_kernels.integrations.vllm.mrope import _digits, first_positions, with_images

GRIDS = ((3, 4), (6, 2))
TEXT = (2, 3, 4)  # in front of the images, between them, behind
TEXTS = [TEXT, (0, 0, 4)]
IMAGE = 1


def unpruned(text: tuple[int, ...] = TEXT) -> Tensor:
    """[3, L], literally: text counts, an image's rows and columns begin at the same number."""
    columns: list[tuple[int, int, int]] = []
    for count, grid in zip(text, (*GRIDS, None), strict=True):
        begin = max((max(c) for c in columns), default=-1) + 1
        columns += [(begin + n,) * 3 for n in range(count)]
        if grid is not None:
            begin += count
            columns += [(begin, begin + row, begin + column) for row in range(grid[0]) for column in range(grid[1])]
    return torch.tensor(columns).T


def prompt(kept: tuple[Tensor, ...], text: tuple[int, ...] = TEXT) -> tuple[Tensor, list[tuple[int, int, int]], Tensor]:
    """Which columns are an image's, the images as `first_positions` takes them, and the columns of the unpruned."""
    is_image, images, columns, start = [], [], [], 0
    for count, grid, indices in zip(text, (*GRIDS, None), (*kept, None), strict=True):
        is_image += [False] * count
        columns += range(start, start + count)
        start += count
        if grid is not None and indices is not None:
            images.append((len(is_image), len(indices), max(grid)))
            is_image += [True] * len(indices)
            columns += (start + indices).tolist()
            start += grid[0] * grid[1]
    return torch.tensor(is_image), images, torch.tensor(columns)


KEPT = (torch.tensor([0, 5, 6, 11]), torch.tensor([3, 8]))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kept", [KEPT, (torch.arange(12), torch.arange(12))])
def test_kept_tokens_have_the_positions_that_they_had(kept: tuple[Tensor, ...], text: tuple[int, ...]) -> None:
    is_image, images, columns = prompt(kept, text)
    first, delta = first_positions(len(is_image), images)
    expected = unpruned(text)[:, columns]
    assert delta == int(unpruned(text).max()) + 1 - len(is_image)
    assert torch.equal(first[:, ~is_image], expected[:, ~is_image])
    digits = [_digits(indices, width) for indices, (_, width) in zip(kept, GRIDS, strict=True)]
    found = with_images(is_image, digits, first, 0)
    assert torch.equal(found, expected)
    assert torch.equal(with_images(is_image, digits, found, 0), expected)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_an_image_that_comes_in_parts(chunk: int, text: tuple[int, ...]) -> None:
    is_image, images, columns = prompt(KEPT, text)
    positions, _ = first_positions(len(is_image), images)
    digits = torch.cat([_digits(indices, width) for indices, (_, width) in zip(KEPT, GRIDS, strict=True)])
    for start in range(0, len(is_image), chunk):
        before, here = int(is_image[:start].sum()), int(is_image[start : start + chunk].sum())
        positions = with_images(is_image, [digits[before : before + here]] if here else [], positions, start)
    assert torch.equal(positions, unpruned(text)[:, columns])


def test_rows_and_columns_survive_bfloat16() -> None:
    width = 5000
    indices = torch.tensor([257 * width + 4999, 3000 * width + 1])
    digits = _digits(indices, width).bfloat16()
    found = with_images(torch.tensor([True, True]), [digits], torch.zeros(3, 2, dtype=torch.int64), 0)
    assert found.tolist() == [[0, 0], [257, 3000], [4999, 1]]


def test_a_prompt_without_images_counts_on() -> None:
    positions, delta = first_positions(4, [])
    assert positions.tolist() == [[0, 1, 2, 3]] * 3
    assert delta == 0
