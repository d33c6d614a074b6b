"""Handwritten digits, coins, faces, textures and photographs of scikit-learn and scikit-image, split three ways.

No digit, coin, face or photograph is in two splits; textures are split by region.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage import data, filters, measure, morphology
from sklearn.datasets import load_digits, load_sample_image

Pixels: TypeAlias = npt.NDArray[np.uint8]

SPLITS = ("train", "validation", "test")
TEXTURES = ("brick", "grass", "gravel")
PHOTOS = {
    "train": ("coffee", "motorcycle", "hubble", "camera", "china", "tissue", "moon", "astronaut"),
    "validation": ("rocket", "retina"),
    "test": ("cat", "flower"),
}
SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
SCALES = (0.8, 1.0, 1.3)  # of photographs, relative to a height of 420 pixels


@dataclass(frozen=True)
class Sources:
    """What the scenes of one split are made of; values of 0 to 255."""

    digits: tuple[Pixels, ...]  # ten times [n, 8, 8], the amount of ink
    coins: Sequence[Pixels]  # [h, w], grey
    faces: Pixels  # [n, 25, 25], grey
    textures: dict[str, Pixels]  # [h, w], grey
    photos: Sequence[Pixels]  # [h, w, 3], each photograph in several sizes


def _share(items: int, split: str, seed: int) -> npt.NDArray[np.int64]:
    """The split's part of so many items, after one fixed shuffle."""
    order = np.random.default_rng(seed).permutation(items)
    low, high = (round(share * items) for share in SHARES[split])
    return np.sort(order[low:high])


def _digits(split: str) -> tuple[Pixels, ...]:
    bunch = load_digits()
    ink = np.clip(bunch.images * (255 / 13), 0, 255).astype(np.uint8)
    return tuple(
        ink[which][_share(len(which), split, digit)]
        for digit in range(10)
        for which in [np.flatnonzero(bunch.target == digit)]
    )


def _coins(split: str) -> list[Pixels]:
    """The image of 24 ancient coins, cut along the outlines of its bright regions."""
    grey = data.coins()
    filled = morphology.closing(grey > filters.threshold_otsu(grey), morphology.disk(3))
    regions = [r for r in measure.regionprops(measure.label(filled)) if r.area > 500 and r.bbox[0] > 0]
    boxes = sorted(r.bbox for r in regions if 0.7 < (r.bbox[2] - r.bbox[0]) / (r.bbox[3] - r.bbox[1]) < 1.4)
    return [
        grey[top:bottom, left:right] for top, left, bottom, right in (boxes[i] for i in _share(len(boxes), split, 0))
    ]


def _faces(split: str) -> Pixels:
    faces = data.lfw_subset()[:100]
    return (faces[_share(100, split, 0)] * 255).astype(np.uint8)


def _texture(name: str, split: str) -> Pixels:
    image: Pixels = getattr(data, name)()
    low, high = (round(share * image.shape[1]) for share in SHARES[split])
    return image[:, low:high] if high - low >= 180 else np.tile(image[:, low:high], (1, 4))


def _photo(name: str) -> Pixels:
    """RGB, without what could be taken for an object of the task (the astronaut's face)."""
    special = {
        "motorcycle": lambda: data.stereo_motorcycle()[0],
        "hubble": data.hubble_deep_field,
        "china": lambda: load_sample_image("china.jpg"),
        "flower": lambda: load_sample_image("flower.jpg"),
        "tissue": data.immunohistochemistry,
        "astronaut": lambda: data.astronaut()[240:],
    }
    image = special.get(name, getattr(data, name, None))()
    return np.stack([image] * 3, -1) if image.ndim == 2 else image[..., :3]


def _sizes(pixels: Pixels, smallest: int) -> list[Pixels]:
    image = Image.fromarray(pixels)
    sized = []
    for scale in SCALES:
        factor = max(420 * scale / image.height, smallest / min(image.size))
        size = (round(image.width * factor), round(image.height * factor))
        sized.append(np.asarray(image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)))
    return sized


@cache
def sources(split: str) -> Sources:
    """The images of `split`: one of train, validation, test."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return Sources(
        digits=_digits(split),
        coins=_coins(split),
        faces=_faces(split),
        textures={name: _texture(name, split) for name in TEXTURES},
        photos=[sized for name in PHOTOS[split] for sized in _sizes(_photo(name), smallest=345)],
    )
