"""Where the visual tokens of images of several sizes lie, against examples made by hand."""

from typing import Any

import pytest
import torch
from PIL import Image

from tests.transformers.vlm.layouts import check_layout, layout_for, tiles, whole, wide_crops
from tests.transformers.vlm.runs_crops import FAMILIES, generate, prompts_of, pruned


def inside(value: float) -> float:
    return min(1.0, max(0.0, value))


def next_wide(group: int, image: int) -> list[tuple[Any, ...]]:
    """20 x 44 pixels in LLaVA-NeXT: 4 x 12 patches in three crops; the image is 8.8 wide, of 1.6 to 10.4."""
    tokens = whole(4, group, image)
    for r in range(4):
        for x in range(2, 10):
            left, right = inside((x - 1.6) / 8.8), inside((x - 0.6) / 8.8)
            tokens.append((r, x % 4, (4, 4), group + 1 + x // 4, image, (left, r / 4, right, (r + 1) / 4)))
        end = inside(8.4 / 8.8)
        tokens.append((r, 2, (4, 4), group + 3, image, (end, r / 4, end, (r + 1) / 4)))
    return tokens


def test_layout_of_llava_next() -> None:
    layout = layout_for(prompts_of("llava_next", "several"))
    # 16 x 16 pixels: the first of the equally good 16 x 32, of which the middle 4 x 4 patches are left.
    square = whole(4, 4, 1)
    for r in range(4):
        for x in range(2, 6):
            square.append((r, x % 4, (4, 4), 5 + x // 4, 1, ((x - 2) / 4, r / 4, (x - 1) / 4, (r + 1) / 4)))
        square.append((r, 2, (4, 4), 6, 1, (1.0, r / 4, 1.0, (r + 1) / 4)))
    check_layout(layout, 0, next_wide(0, 0) + square)
    assert layout.positions.shape[1] == 52 + 36


def test_layout_of_llava_onevision_shrinks_the_grid_of_every_crop() -> None:
    layout = layout_for(FAMILIES["llava_onevision"]([[(60, 60)]]))
    expected = whole(5, 0, 0)
    side = 7 / 3  # 15 patches in three crops, shrunk to 7 tokens
    crop = [0, 0, 1, 1, 1, 2, 2]
    for r in range(7):
        for c in range(7):
            group = 1 + 3 * crop[r] + crop[c]
            box = (c / 7, r / 7, (c + 1) / 7, (r + 1) / 7)
            expected.append((r - crop[r] * side, c - crop[c] * side, (side, side), group, 0, box))
        beside = 7 - 2 * side
        expected.append((r - crop[r] * side, beside, (side, side), 3 + 3 * crop[r], 0, (1.0, r / 7, 1.0, (r + 1) / 7)))
    check_layout(layout, 0, expected)


def test_layout_of_several_images_in_llava_onevision() -> None:
    layout = layout_for(prompts_of("llava_onevision", "several"))
    # No crops: padded to a square. 20 x 44 pixels are 25/11 x 5 patches in the middle of 5 x 5.
    top, high = (5 - 25 / 11) / 2, 25 / 11
    expected = [
        (r, c, (5, 5), 0, 0, (c / 5, inside((r - top) / high), (c + 1) / 5, inside((r + 1 - top) / high)))
        for r in range(5)
        for c in range(5)
    ]
    expected.append((4, 5, (5, 5), 0, 0, (1.0, 1.0, 1.0, 1.0)))
    expected += [*whole(5, 1, 1), (4, 5, (5, 5), 1, 1, (1.0, 0.8, 1.0, 1.0))]
    check_layout(layout, 0, expected)


def test_layout_of_a_image_and_a_video_in_llava_onevision() -> None:
    layout = layout_for(prompts_of("llava_onevision", "video"))

    def video(group: int, image: int) -> list[tuple[Any, ...]]:
        frames = [token for f in range(3) for token in whole(3, group + f, image + f)]
        return [*frames, (2, 3, (3, 3), group + 2, image + 2, (1.0, 2 / 3, 1.0, 1.0))]

    check_layout(layout, 0, video(0, 0))
    check_layout(layout, 1, wide_crops(0, 0) + video(4, 1))


def internvl_tiles(rows: int, columns: int, group: int, image: int) -> list[tuple[Any, ...]]:
    return tiles(rows, columns, group, image) + whole(4, group + rows * columns, image)


@pytest.mark.parametrize(("rows", "columns"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_layout_of_internvl_finds_out_how_its_tiles_are_arranged(rows: int, columns: int) -> None:
    images = [[(16 * rows, 16 * columns), (16, 16)], [(16, 32)]]
    layout = layout_for(FAMILIES["internvl"](images))
    check_layout(layout, 0, internvl_tiles(rows, columns, 0, 0) + whole(4, 7, 1))
    check_layout(layout, 1, internvl_tiles(1, 2, 0, 0))


def test_layout_of_internvl_frames() -> None:
    layout = layout_for(prompts_of("internvl", "video"))
    check_layout(layout, 0, [token for f in range(3) for token in whole(4, f, f)])
    check_layout(layout, 1, internvl_tiles(2, 1, 0, 0) + whole(4, 3, 1) + whole(4, 4, 2))


def test_layout_of_pixtral_is_that_of_each_images_own_size() -> None:
    # 36 patches that are no 6 x 6, and 40 that are no square at all, padded to 20 x 36 pixels in one batch.
    layout = layout_for(FAMILIES["pixtral"]([[(16, 36), (20, 32)], [(36, 16)]]))
    check_layout(layout, 0, whole((4, 9), 0, 0) + whole((5, 8), 1, 1))
    check_layout(layout, 1, whole((9, 4), 0, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_overlay_brightens_what_the_kept_tokens_see(family: str) -> None:
    prompts = prompts_of(family, "single")
    if family == "llava_next":
        boxes = [token[-1] for token in next_wide(0, 0)]
    elif family == "internvl":
        boxes = [token[-1] for token in internvl_tiles(1, 3, 0, 0)]
    elif family == "pixtral":
        boxes = [token[-1] for token in whole((5, 11), 0, 0)]
    else:
        boxes = [(c / 5, r / 5, (c + 1) / 5, (r + 1) / 5) for r in range(5) for c in range(5)]
        boxes += [
            (min(x, 10) / 11 + (x == 11) / 11, r / 5, min(x + 1, 11) / 11, (r + 1) / 5)
            for r in range(5)
            for x in range(12)
        ]
    assert len(boxes) == int((prompts.inputs["input_ids"] == prompts.visual).sum())
    with pruned(prompts, "random", 9) as pruning:
        generate(prompts, 1)
        width, height = 440, 200
        shown = pruning.overlay(Image.new("RGB", (width, height), (200, 100, 40)))
    bright = torch.zeros(height, width, dtype=torch.bool)
    for token in pruning.kept[0].tolist():
        left, top, right, bottom = (
            round(part * size) for part, size in zip(boxes[token], (width, height) * 2, strict=True)
        )
        bright[top:bottom, left:right] = True
    assert 0 < bright.sum() < width * height
    pixels = torch.tensor(list(shown.tobytes())).view(height, width, 3)
    assert torch.equal(pixels[..., 0] == 200, bright)
    assert torch.equal(pixels[..., 0] == 50, ~bright)
