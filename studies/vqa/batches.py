"""Training batches: scenes, as many questions as fit behind each, and what every visual token shows.

The questions of an image share one sequence. Each attends to the image and to itself alone, at the positions it
would have by itself, so a packed question is answered as a single one is.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .model import DEVIATION, MEAN, SIDE
from .questions import FAMILIES, Question, ask
from .scene import CELL_TOKENS, COLOURS, KINDS, PATCH, Scene, scene
from .sources import TEXTURES
from .words import EOS, PAD, encode

SHOWN = (*KINDS, *TEXTURES, "photo")  # what a visual token may show
INK = tuple(COLOURS)
GROUND = (*TEXTURES, "photo")
NONE = -100  # the target that cross_entropy ignores


class Batch(NamedTuple):
    """N visual tokens are the window of S x S = N tokens of the image; T text tokens."""

    pixels: Tensor  # [B, 3, 14 S, 14 S], normalised
    window: Tensor  # [B, N]: indices of the visual tokens in the whole image of 24 x 24
    text: Tensor  # [B, T]
    positions: Tensor  # [B, T], of the text tokens
    block: Tensor  # [B, T]: the question each token belongs to, -1 for padding
    targets: Tensor  # [B, T]: what comes next at the answers
    family: Tensor  # [B, T]: index of the family where the answer is predicted
    shown: Tensor  # [B, N]: index into SHOWN
    ink: Tensor  # [B, N]: index into INK on digits
    tiny: Tensor  # [B, N]: 1 on the tiny digit, 0 on the others
    ground: Tensor  # [B, N]: index into GROUND of what an object lies on
    look: Tensor  # [B, T, N] bool: where the answer is to be seen, at the tokens that answers follow


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S], as the image processor does it."""
    return ((pixels.float() / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2).contiguous()


def _cover(start: int, size: int, patches: int) -> npt.NDArray[np.float64]:
    """How much of each patch along an axis an interval covers, in 0 to 1."""
    edge = np.arange(patches) * PATCH
    return np.clip(np.minimum(edge + PATCH, start + size) - np.maximum(edge, start), 0, PATCH) / PATCH


def labels(image: Scene) -> tuple[npt.NDArray[np.int64], ...]:
    """Per visual token, row by row: what it shows, the ink, whether it is the tiny digit, what the object lies on."""
    side = image.pixels.shape[0] // PATCH
    shown = np.full((side, side), len(SHOWN) - 1)
    ink, tiny, ground = np.full((3, side, side), NONE)
    for texture in image.textures:
        r0, r1, c0, c1 = (CELL_TOKENS * edge for edge in texture.cells)
        shown[r0:r1, c0:c1] = SHOWN.index(texture.kind)
    for thing in image.things:
        there = np.outer(_cover(thing.top, thing.size, side), _cover(thing.left, thing.size, side)) >= 0.3
        ground[there] = GROUND.index(next((t.kind for t in image.textures if thing in image.on(t)), "photo"))
        shown[there] = SHOWN.index(thing.kind)
        if thing.colour is not None:
            ink[there] = INK.index(thing.colour)
            tiny[there] = thing.tiny
    return shown.ravel(), ink.ravel(), tiny.ravel(), ground.ravel()


def in_cells(cells: Iterable[tuple[int, int]], side: int) -> npt.NDArray[np.bool_]:
    """[N]: the visual tokens of those cells, of an image of side x side."""
    inside = np.zeros((side, side), dtype=bool)
    for row, column in cells:
        inside[CELL_TOKENS * row :, CELL_TOKENS * column :][:CELL_TOKENS, :CELL_TOKENS] = True
    return inside.ravel()


def _look(question: Question, side: int) -> npt.NDArray[np.bool_]:
    """[N]: the cells where the answer is to be seen; of a relation the second object's."""
    return in_cells(question.cells[-1:] if question.family == "relation" else question.cells, side)


def _pack(questions: list[Question], length: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """[5, T] text, positions, block, targets, family, and [T, N] look; questions that no longer fit are left out."""
    look = np.zeros((length, side * side), dtype=bool)
    rows = np.full((5, length), NONE)
    rows[0], rows[1], rows[2] = PAD, 0, -1
    start = 0
    for number, question in enumerate(questions):
        asked, answer = encode(question.text), encode(question.answer)
        tokens = (*asked, *answer)
        end = start + len(tokens)
        if end > length:
            continue
        rows[0, start:end] = tokens
        rows[1, start:end] = 1 + SIDE * SIDE + np.arange(len(tokens))
        rows[2, start:end] = number
        rows[3, start + len(asked) - 1 : end] = [*answer, EOS]
        rows[4, start + len(asked) - 1] = list(FAMILIES).index(question.family)
        look[start + len(asked) - 1] = _look(question, side)
        start = end
    return rows, look


class Batches(Dataset[Batch]):
    """The batches of a stage: number `n` is the same whenever it is asked for, so training can resume."""

    def __init__(
        self,
        split: str,
        cells: int,
        batch: int,
        length: int,
        seed: int,
        families: tuple[str, ...] = tuple(FAMILIES),
        easy: tuple[int, int] = (0, 0),
    ) -> None:
        self.split, self.cells, self.batch, self.length = split, cells, batch, length
        self.seed, self.families, self.easy = seed, families, easy

    def ease(self, number: int) -> float:
        """1 up to the first number of `easy`, 0 from the second one on."""
        first, last = self.easy
        return min(1.0, max(0.0, (last - number) / max(1, last - first)))

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng((self.seed, number))
        ease = self.ease(number)
        images = [scene(self.split, (self.seed, number, n), self.cells, ease) for n in range(self.batch)]
        side = CELL_TOKENS * self.cells
        token = np.arange(side * side)
        corner = rng.integers(0, SIDE - side, size=(self.batch, 2), endpoint=True)
        window = (token // side + corner[:, :1]) * SIDE + token % side + corner[:, 1:]
        questions = [ask(p, rng, self.length // 5, self.families) if self.length else [] for p in images]
        packed, look = zip(*(_pack(asked, self.length, side) for asked in questions), strict=True)
        pixels = normalised(torch.from_numpy(np.stack([p.pixels for p in images])))
        seen = np.stack([np.stack(labels(p)) for p in images], 1)
        arrays = (window, *np.stack(packed, 1), *seen, np.stack(look))
        return Batch(pixels, *(torch.from_numpy(x) for x in arrays))


def mask(batch: Batch) -> Tensor:
    """[B, 1, T, 1 + N + T] to add to the logits: a text token sees the image and its own question up to itself."""
    length, seen = batch.text.shape[1], 1 + batch.window.shape[1]
    same = batch.block.unsqueeze(2) == batch.block.unsqueeze(1)
    own = same & torch.ones(length, length, dtype=torch.bool).tril()
    bias = torch.zeros(len(batch.text), 1, length, seen + length)
    bias[:, 0, :, seen:].masked_fill_(~own, float("-inf"))
    return bias
