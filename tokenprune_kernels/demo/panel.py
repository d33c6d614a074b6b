"""The picture of the result: the photo with the question marked, and next to it what each method keeps of it."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .features import GRID, QUESTION_RADIUS

CELL = 18  # pixels of the panel per patch
TILE = GRID * CELL
GAP = 28
CAPTION = 58
HEADER = 92
COLUMNS = 3
HEADING_SIZE = 30
SUBTITLE_SIZE = 17
TITLE_SIZE = 23
NOTE_SIZE = 15
RING = QUESTION_RADIUS + 0.75  # in patches: the question lies inside

BACKGROUND = (16, 19, 24)
INK = (238, 240, 244)
QUIET = (150, 158, 170)
ACCENT = (255, 196, 61)
EDGE = (255, 255, 255)


class Tile(NamedTuple):
    title: str
    note: str
    kept: list[int] | None  # None: the photo itself


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    """Pixels from the start of a line of text to its end."""
    return _font(size).getlength(text)


def panel_size(tiles: int) -> tuple[int, int]:
    """Width and height of the panel that shows so many tiles, the photo among them."""
    columns = min(COLUMNS, tiles)
    rows = -(-tiles // columns)
    return columns * (TILE + GAP) + GAP, HEADER + rows * (CAPTION + TILE + GAP)


def _ring(canvas: Image.Image, focus: tuple[float, float]) -> None:
    """A ring around the question: drawn large and reduced, because Pillow's circles have no smooth edge."""
    fine = 4
    x, y = ((min(int(at * GRID), GRID - 1) + 0.5) * CELL * fine for at in focus)
    for radius, thickness, colour in ((RING + 0.08, 0.34, BACKGROUND), (RING, 0.18, ACCENT)):
        mask = Image.new("L", (TILE * fine, TILE * fine))
        r = radius * CELL * fine
        box = (x - r, y - r, x + r, y + r)
        ImageDraw.Draw(mask).ellipse(box, outline=255, width=round(thickness * CELL * fine))
        canvas.paste(colour, (0, 0), mask.resize((TILE, TILE), Image.Resampling.BOX))


def _outline(canvas: Image.Image, kept: npt.NDArray[np.bool_]) -> None:
    """Lines along the borders between kept and dropped patches."""
    draw = ImageDraw.Draw(canvas)
    padded = np.pad(kept, 1)
    for row, column in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        y = min(row * CELL, TILE - 1)
        draw.line((column * CELL, y, (column + 1) * CELL - 1, y), fill=EDGE)
    for row, column in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        x = min(column * CELL, TILE - 1)
        draw.line((x, row * CELL, x, (row + 1) * CELL - 1), fill=EDGE)


def _dimmed(photo: Image.Image) -> Image.Image:
    """Grey and dark, yet recognisable."""
    grey = photo.convert("L").convert("RGB")
    return Image.blend(Image.new("RGB", photo.size, BACKGROUND), grey, 0.30)


def _tile(photo: Image.Image, focus: tuple[float, float], kept: list[int] | None) -> Image.Image:
    if kept is None:
        canvas = photo.copy()
        _ring(canvas, focus)
        return canvas
    grid = np.zeros((GRID, GRID), dtype=np.uint8)
    grid.flat[kept] = 255
    mask = Image.fromarray(grid).resize((TILE, TILE), Image.Resampling.NEAREST)
    canvas = Image.composite(photo, _dimmed(photo), mask)
    _outline(canvas, grid > 0)
    return canvas


def draw(
    square: Image.Image, focus: tuple[float, float], heading: str, subtitle: str, tiles: list[Tile]
) -> Image.Image:
    """The whole panel; `square` is the cut photo and `focus` a point of it in fractions."""
    photo = square.resize((TILE, TILE), Image.Resampling.LANCZOS)
    panel = Image.new("RGB", panel_size(len(tiles)), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    draw.text((GAP, 24), heading, font=_font(HEADING_SIZE), fill=INK)
    draw.text((GAP, 64), subtitle, font=_font(SUBTITLE_SIZE), fill=QUIET)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, COLUMNS)
        x, y = GAP + column * (TILE + GAP), HEADER + row * (CAPTION + TILE + GAP)
        draw.text((x, y + 8), tile.title, font=_font(TITLE_SIZE), fill=ACCENT if tile.kept is None else INK)
        draw.text((x, y + 36), tile.note, font=_font(NOTE_SIZE), fill=QUIET)
        panel.paste(_tile(photo, focus, tile.kept), (x, y + CAPTION))
    return panel
