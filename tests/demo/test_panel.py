"""The demo's images: reading the user's, and the pixels of the panel."""

from pathlib import Path

import pytest
import torch

from tests.demo.case import MISSING, NAMES

if MISSING:
    pytest.skip(f"the demo's extras are not installed: {', '.join(MISSING)}", allow_module_level=True)

import numpy as np
from PIL import Image

from tokenprune_kernels.demo import panel, photo
from tokenprune_kernels.methods import get_method

COLOUR = (200, 60, 20)


def _boxes(tokens: list[int], columns: int, rows: int) -> torch.Tensor:
    coordinates = [(token % columns, token // columns) for token in tokens]
    size = torch.tensor([columns, rows, columns, rows])
    return torch.tensor([(c, r, c + 1, r + 1) for c, r in coordinates]).reshape(-1, 4) / size


@pytest.mark.parametrize(("size", "grid"), [((100, 100), (24, 24)), ((200, 100), (12, 6)), ((30, 90), (4, 12))])
def test_panel_shows_kept_boxes_outlined_and_dims_the_rest(size: tuple[int, int], grid: tuple[int, int]) -> None:
    columns, rows = grid
    kept = [0, columns + 1, columns * rows - 1]
    tiles = [panel.Tile("All", "7", "note", None), panel.Tile("some", "8", "note", _boxes(kept, *grid))]
    image = Image.new("RGB", size, COLOUR)
    drawn = panel.draw(image, "heading", "subtitle", tiles)
    plan = panel.layout("heading", tiles)
    assert drawn.size == plan.size
    width, height = panel.fitted(size)
    assert max(width, height) == panel.TILE
    for number in range(2):
        left, top = plan.corner(number)
        left, top = left + (panel.TILE - width) // 2, top + (panel.TILE - height) // 2
        bright = []
        for token in range(columns * rows):
            x, y = (token % columns + 0.5) * width / columns, (token // columns + 0.5) * height / rows
            pixel = drawn.getpixel((left + int(x), top + int(y)))
            if pixel == COLOUR:
                bright.append(token)
            else:
                assert max(pixel) < 80
        assert bright == (kept if number else list(range(columns * rows)))
        assert (drawn.getpixel((left, top)) == panel.EDGE) == bool(number)
        if width < panel.TILE:
            assert drawn.getpixel((left - 1, top + 5)) == panel.BACKGROUND
        if height < panel.TILE:
            assert drawn.getpixel((left + 5, top - 1)) == panel.BACKGROUND


def test_overlapping_boxes_of_crops_have_one_outline() -> None:
    boxes = torch.tensor([(0.25, 0.25, 0.75, 0.75), (0.5, 0.5, 0.6, 0.6)])
    kept = panel.kept_pixels(boxes, (80, 40))
    assert kept.sum() == 40 * 20
    shown = np.asarray(panel.shown(Image.new("RGB", (80, 80), COLOUR), boxes))
    assert (shown == panel.EDGE).all(-1).sum() == 4 * (panel.TILE // 2 - 1)


def test_every_box_covers_a_pixel() -> None:
    assert panel.kept_pixels(_boxes([575], 24, 24), (432, 1)).sum() == 18
    assert panel.kept_pixels(_boxes([3], 4, 1), (2, 2)).sum() == 2
    assert panel.fitted((10000, 1)) == (panel.TILE, 1)
    assert panel.shown(Image.new("RGB", (10000, 1)), _boxes([0, 575], 24, 24)).size == (panel.TILE, 1)


def test_long_texts_are_wrapped_and_cut() -> None:
    answer = "a long answer of many words " * 20
    tiles = [panel.Tile("All", "7", "", None), panel.Tile("some", answer, "", None, True)]
    plan = panel.layout("a question without an end " * 20, tiles)
    assert len(plan.heading) == 2
    assert len(plan.answers[1]) == panel.ANSWER_LINES
    assert plan.answers[1][-1].endswith("...")
    assert plan.caption > panel.layout("short", tiles[:1]).caption
    for line in plan.heading:
        assert panel.text_width(line, panel.HEADING_SIZE) <= plan.size[0] - 2 * panel.GAP
    for line in plan.answers[1]:
        assert panel.text_width(line, panel.ANSWER_SIZE) <= panel.TILE
    unbroken = panel.wrapped("x" * 300, panel.ANSWER_SIZE, panel.TILE, 20)
    assert "".join(unbroken) == "x" * 300
    assert panel.wrapped("  one\n two ", panel.ANSWER_SIZE, panel.TILE, 3) == ["one two"]
    assert panel.wrapped("", panel.ANSWER_SIZE, panel.TILE, 3) == []


def test_answers_that_differ_have_another_colour() -> None:
    for differs, colour, absent in ((False, panel.ACCENT, panel.OTHER), (True, panel.OTHER, panel.ACCENT)):
        tile = panel.Tile("some", "HHHH", "", None, differs)
        drawn = np.asarray(panel.draw(Image.new("RGB", (9, 9)), "heading", "", [tile]))
        assert (drawn == colour).all(-1).any()
        assert not (drawn == absent).all(-1).any()


def test_titles_and_notes_fit_their_column() -> None:
    described = [get_method(name) for name in NAMES]
    assert len({method.title for method in described}) == len(NAMES)
    for method in described:
        assert method.summary
        assert panel.text_width(method.summary, panel.NOTE_SIZE) <= panel.TILE
        assert panel.text_width(f"{method.title}: 2880 kept", panel.TITLE_SIZE) <= panel.TILE


def test_deep_grey_image_is_not_clipped(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = np.asarray(photo.load(tmp_path / "deep.png"))
    assert (loaded == np.arange(256).reshape(16, 16, 1)).all()


def test_turned_photograph_is_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert photo.load(tmp_path / "turned.jpg").size == (10, 20)
