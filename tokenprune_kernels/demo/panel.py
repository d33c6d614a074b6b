"""The image of the result: the image with the full answer, and next to it what each method keeps and answers."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 432  # pixels: images are fitted into such a square
GAP = 28
COLUMNS = 3
HEADING_SIZE = 30
SUBTITLE_SIZE = 17
TITLE_SIZE = 23
ANSWER_SIZE = 19
NOTE_SIZE = 15
LEADING = 1.3  # from line to line, in text sizes
ANSWER_LINES = 3

BACKGROUND = (16, 19, 24)
INK = (238, 240, 244)
QUIET = (150, 158, 170)
ACCENT = (255, 196, 61)
OTHER = (255, 122, 107)
EDGE = (255, 255, 255)


class Tile(NamedTuple):
    """boxes: left, top, right, bottom of what is kept, in parts of the image; None: the image itself."""

    title: str
    answer: str
    note: str
    boxes: Tensor | None
    differs: bool = False  # the answer, from that with all tokens


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    """Pixels from the start of a line of text to its end."""
    return _font(size).getlength(text)


def _cut(text: str, size: int, width: int) -> str:
    """The beginning, as much as fits, with an ellipsis."""
    while text and text_width(text + "...", size) > width:
        text = text[:-1]
    return text + "..."


def wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """At most so many lines, broken between words, or inside one that is too long; what is left out shows as dots."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest:
        if len(lines) == most - 1 and text_width(rest, size) > width:
            return [*lines, _cut(rest, size, width)]
        end = len(rest)
        while end > 1 and text_width(rest[:end], size) > width:
            space = rest.rfind(" ", 0, end)
            end = space if space > 0 else end - 1
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def fitted(size: tuple[int, int]) -> tuple[int, int]:
    """The size of an image in its tile."""
    scale = TILE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def kept_pixels(boxes: Tensor, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """[height, width]: what the boxes cover, a pixel at least of each; those of crops overlap."""
    width, height = size
    kept = np.zeros((height, width), dtype=np.bool_)
    corners = (boxes.double().numpy() * (width, height, width, height)).round().astype(np.int64)
    for left, top, right, bottom in corners.tolist():
        left, top = min(left, width - 1), min(top, height - 1)
        kept[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return kept


def _outline(kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The outermost kept pixels, those along the image's edge included."""
    padded = np.pad(kept, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return kept & ~inside


def _dimmed(image: Image.Image) -> Image.Image:
    """Grey and dark, yet recognisable."""
    grey = image.convert("L").convert("RGB")
    return Image.blend(Image.new("RGB", image.size, BACKGROUND), grey, 0.30)


def shown(image: Image.Image, boxes: Tensor | None) -> Image.Image:
    """The image at the size of its tile, dimmed where no kept token looks."""
    small = image.resize(fitted(image.size), Image.Resampling.LANCZOS)
    if boxes is None:
        return small
    kept = kept_pixels(boxes, small.size)
    small = Image.composite(small, _dimmed(small), Image.fromarray(kept))
    small.paste(EDGE, mask=Image.fromarray(_outline(kept)))
    return small


def _height(size: int, lines: int) -> int:
    return round(lines * size * LEADING)


class Layout(NamedTuple):
    """Where things are: the image of tile n is in the square of TILE pixels at `corner(n)`."""

    heading: list[str]
    answers: list[list[str]]
    size: tuple[int, int]
    header: int
    caption: int
    columns: int

    def corner(self, number: int) -> tuple[int, int]:
        row, column = divmod(number, self.columns)
        return GAP + column * (TILE + GAP), self.header + row * (self.caption + TILE + GAP) + self.caption


def layout(heading: str, tiles: list[Tile]) -> Layout:
    """Every row of tiles has room for the longest answer."""
    columns = min(COLUMNS, len(tiles))
    width = columns * (TILE + GAP) + GAP
    head = wrapped(heading, HEADING_SIZE, width - 2 * GAP, 2)
    answers = [wrapped(tile.answer, ANSWER_SIZE, TILE, ANSWER_LINES) for tile in tiles]
    header = 24 + _height(HEADING_SIZE, len(head)) + _height(SUBTITLE_SIZE, 1) + 8
    lines = max(1, *map(len, answers))
    caption = 6 + _height(TITLE_SIZE, 1) + _height(ANSWER_SIZE, lines) + _height(NOTE_SIZE, 1) + 8
    rows = -(-len(tiles) // columns)
    return Layout(head, answers, (width, header + rows * (caption + TILE + GAP)), header, caption, columns)


def draw(image: Image.Image, heading: str, subtitle: str, tiles: list[Tile]) -> Image.Image:
    """The whole panel."""
    plan = layout(heading, tiles)
    panel = Image.new("RGB", plan.size, BACKGROUND)
    pen = ImageDraw.Draw(panel)

    def write(x: int, y: int, lines: list[str], size: int, colour: tuple[int, int, int]) -> int:
        for number, line in enumerate(lines):
            pen.text((x, y + _height(size, number)), line, font=_font(size), fill=colour)
        return y + _height(size, len(lines))

    y = write(GAP, 24, plan.heading, HEADING_SIZE, INK)
    write(GAP, y, wrapped(subtitle, SUBTITLE_SIZE, plan.size[0] - 2 * GAP, 1), SUBTITLE_SIZE, QUIET)
    for number, tile in enumerate(tiles):
        x, top = plan.corner(number)
        y = write(x, top - plan.caption + 6, [tile.title], TITLE_SIZE, INK)
        y = write(x, y, [tile.note], NOTE_SIZE, QUIET)
        write(x, y, plan.answers[number], ANSWER_SIZE, OTHER if tile.differs else ACCENT)
        content = shown(image, tile.boxes)
        panel.paste(content, (x + (TILE - content.width) // 2, top + (TILE - content.height) // 2))
    return panel
