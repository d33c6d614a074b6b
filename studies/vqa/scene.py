"""Random scenes: objects in a grid of cells on a photograph, some of them on a patch of texture.

A scene is known exactly (what, which colour, where), so questions about it have exact answers. The cells are 6 x 6
visual tokens; sizes and offsets inside them are random. `cells=4` is the task; smaller scenes are windows of it, which
training begins with.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from .sources import SPLITS, TEXTURES, Pixels, Sources, sources

PATCH = 14  # pixels of a visual token
CELL_TOKENS = 6  # visual tokens along the side of a cell
CELL = CELL_TOKENS * PATCH
COLOURS = {  # of the stickers that digits are written on
    "red": (160, 25, 25), "green": (20, 115, 35), "blue": (35, 60, 180), "yellow": (150, 125, 0), "black": (20, 20, 20),
}  # fmt: skip
DIGITS = tuple(str(digit) for digit in range(10))
KINDS = (*DIGITS, "coin", "face")
JITTER = 3  # pixels
OBJECTS = {1: (1, 1), 2: (3, 4), 3: (4, 7), 4: (6, 9)}  # by the number of cells along a side


class Thing(NamedTuple):
    """An object: its word, where it is (pixels), and for digits the colour of the sticker."""

    kind: str
    cell: tuple[int, int]  # row, column
    top: int
    left: int
    size: int
    colour: str | None
    tiny: bool


class Texture(NamedTuple):
    """A rectangle of texture; it covers whole cells but for a narrow edge."""

    kind: str
    cells: tuple[int, int, int, int]  # rows [0] to [1], columns [2] to [3], the ends excluded


@dataclass(frozen=True)
class Scene:
    """The image [S, S, 3], uint8, and what is in it."""

    cells: int
    things: tuple[Thing, ...]
    textures: tuple[Texture, ...]
    pixels: Pixels = field(repr=False)

    def at(self, row: int, column: int) -> Thing | None:
        """The object in a cell, if there is one."""
        return next((thing for thing in self.things if thing.cell == (row, column)), None)

    def on(self, texture: Texture) -> list[Thing]:
        """The objects on a texture."""
        top, bottom, left, right = texture.cells
        return [t for t in self.things if top <= t.cell[0] < bottom and left <= t.cell[1] < right]


def _kinds(rng: np.random.Generator, count: int) -> list[str]:
    """Three quarters digits; in half of the scenes one kind is there several times, so that counting has answers."""
    kinds = []
    for _ in range(count):
        draw = rng.random()
        kinds.append("coin" if draw < 0.12 else "face" if draw < 0.24 else DIGITS[rng.integers(10)])
    if count > 2 and rng.random() < 0.5:
        again = KINDS[rng.integers(len(KINDS))]
        for index in rng.permutation(count)[: rng.integers(2, 4)]:
            kinds[index] = again
    return kinds


def _thing(rng: np.random.Generator, kind: str, cell: tuple[int, int], tiny: bool, ease: float) -> Thing:
    """An object of about 2 to 5 visual tokens across, near the borders of tokens; eased, exactly 4 in the middle."""
    tokens = 4 if rng.random() < ease else 2 if tiny else int(rng.integers(3, 5, endpoint=True))
    spread = (1 - ease) * JITTER
    size = tokens * PATCH - round(rng.uniform(0, spread))
    top, left = (
        coordinate * CELL + min(max(0, _slot(rng, tokens, ease) + round(rng.uniform(-spread, spread))), CELL - size)
        for coordinate in cell
    )
    colour = list(COLOURS)[rng.integers(len(COLOURS))] if kind in DIGITS else None
    if colour is not None and rng.random() < ease:
        colour = "black"
    return Thing(kind, cell, top, left, size, colour, tiny and tokens == 2)


def _slot(rng: np.random.Generator, tokens: int, ease: float) -> int:
    """Pixels from the edge of the cell."""
    return PATCH * (
        (CELL_TOKENS - tokens) // 2
        if rng.random() < ease
        else int(rng.integers(0, CELL_TOKENS - tokens, endpoint=True))
    )


def _between(hard: float, easy: float, ease: float) -> float:
    return hard + (easy - hard) * ease


def _texture(rng: np.random.Generator, cells: int) -> Texture:
    longest = 2 if cells > 2 else 1
    height, width = (int(n) for n in rng.integers(1, longest, size=2, endpoint=True))
    top, left = int(rng.integers(cells - height + 1)), int(rng.integers(cells - width + 1))
    return Texture(TEXTURES[rng.integers(len(TEXTURES))], (top, top + height, left, left + width))


# --- drawing -------------------------------------------------------------------------------------------------------


@cache
def _round_mask(size: int, power: int = 2) -> npt.NDArray[np.float32]:
    """1 in the circle (higher powers: the rounded square), with a soft edge."""
    offset = np.abs(np.arange(size) - (size - 1) / 2) ** power
    distance = (offset[:, None] + offset[None, :]) ** (1 / power)
    mask: npt.NDArray[np.float32] = np.clip(size / 2 - distance, 0, 1).astype(np.float32)[..., None]
    return mask


def _turned(pixels: Pixels, size: int, rng: np.random.Generator, degrees: float) -> npt.NDArray[np.float32]:
    """The grey image at another size, turned by up to so many degrees; [size, size] in 0 to 1."""
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    image = Image.fromarray(pixels)
    cos, sin = np.cos(angle), np.sin(angle)
    scale_x, scale_y = image.width / size, image.height / size
    middle = (size - 1) / 2
    x0 = scale_x * (middle - cos * middle + sin * middle) + (scale_x - 1) / 2
    y0 = scale_y * (middle - sin * middle - cos * middle) + (scale_y - 1) / 2
    affine = (
        scale_x * cos,
        -scale_x * sin,
        x0 + 0.5 - scale_x / 2,
        scale_y * sin,
        scale_y * cos,
        y0 + 0.5 - scale_y / 2,
    )
    turned = image.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.asarray(turned, dtype=np.float32) / 255


def _drawn(here: Pixels, thing: Thing, source: Sources, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """The background of an object with the object on it, in 0 to 255."""
    if thing.colour is None:
        images = source.coins if thing.kind == "coin" else source.faces
        image = images[rng.integers(len(images))]
        grey = _turned(image, thing.size, rng, 25 if thing.kind == "coin" else 8)[..., None]
        mask = _round_mask(thing.size)
        return here * (1 - mask) + mask * (255 * grey * np.float32(rng.uniform(0.8, 1.1)))
    images = source.digits[int(thing.kind)]
    ink = _turned(images[rng.integers(len(images))], thing.size, rng, 8)[..., None]
    # White handwriting on a coloured sticker: its shape is the same in all colours.
    cover = np.float32(0.75 if thing.tiny else 0.95) * _round_mask(thing.size, 6)
    sticker = here * (1 - cover) + cover * np.array(COLOURS[thing.colour], dtype=np.float32)
    strength = ink * np.float32(rng.uniform(0.65, 0.85) if thing.tiny else rng.uniform(0.9, 1))
    return sticker * (1 - strength) + strength * 250


def _render(
    cells: int, things: list[Thing], textures: list[Texture], source: Sources, rng: np.random.Generator, ease: float
) -> Pixels:
    side = cells * CELL
    photo = source.photos[rng.integers(len(source.photos))]
    top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
    shade = (np.arange(256) * _between(rng.uniform(0.5, 0.95), 0.15, ease)).astype(np.uint8)
    canvas = shade[photo[top : top + side, left : left + side]]
    if rng.random() < 0.5:
        canvas = np.ascontiguousarray(canvas[:, ::-1])
    for texture in textures:
        r0, r1, c0, c1 = (edge * CELL for edge in texture.cells)
        part = canvas[r0 + 1 : r1 - 1, c0 + 1 : c1 - 1]
        image = source.textures[texture.kind]
        top, left = (int(rng.integers(image.shape[axis] - part.shape[axis] + 1)) for axis in (0, 1))
        part[:] = image[top : top + part.shape[0], left : left + part.shape[1], None] * rng.uniform(0.7, 1)
    for thing in things:
        here = canvas[thing.top : thing.top + thing.size, thing.left : thing.left + thing.size]
        here[:] = np.clip(_drawn(here, thing, source, rng), 0, 255)
    return canvas


def scene(split: str, seed: int | tuple[int, ...], cells: int = 4, ease: float = 0.0) -> Scene:
    """The scene of a seed; split is "train", "validation" or "test", and `cells` 1 to 4.

    Up to ease=1 stickers are blacker, backgrounds darker, sizes and offsets more alike: training begins there.

    >>> a, b = scene("test", 7), scene("test", 7)
    >>> a.pixels.shape, bool((a.pixels == b.pixels).all()), a.things == b.things
    ((336, 336, 3), True, True)
    """
    rng = np.random.default_rng((*((seed,) if isinstance(seed, int) else seed), cells, SPLITS.index(split)))
    textures = [_texture(rng, cells)] if rng.random() < 0.75 else []
    count = int(rng.integers(*OBJECTS[cells], endpoint=True))
    taken = [divmod(int(index), cells) for index in rng.permutation(cells * cells)[:count]]
    kinds = _kinds(rng, count)
    tiny = next((n for n, kind in enumerate(kinds) if kind in DIGITS), None) if rng.random() < 0.8 else None
    things = [_thing(rng, kind, cell, n == tiny, ease) for n, (kind, cell) in enumerate(zip(kinds, taken, strict=True))]
    return Scene(cells, tuple(things), tuple(textures), _render(cells, things, textures, sources(split), rng, ease))
