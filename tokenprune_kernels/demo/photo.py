"""The picture, the point of interest in it and the square that is cut into patches."""

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DEFAULT_FOCUS = (0.38, 0.39)  # the eye of the cat in the default photograph


class DemoError(ValueError):
    """What the user asked for cannot be done; the message is the one line they see."""


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow clips deeper grey pictures at 255; they are stretched from their darkest to their brightest value."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    span = max(values.max() - values.min(), 1e-12)
    return Image.fromarray(((values - values.min()) * (255 / span)).round().astype(np.uint8))


def load(path: str | None) -> Image.Image:
    """The photograph in RGB, upright; without a path the one that ships inside scikit-image."""
    if path is None:
        from skimage import data

        return Image.fromarray(data.chelsea())
    if not Path(path).is_file():
        raise DemoError(f"--image: {'not a file' if Path(path).exists() else 'no such file'}: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
    # Pillow's decoders report damaged files with several exception types.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = " ".join(str(error).split())
        if str(path) not in reason:
            reason = f"{path}: {reason}"
        raise DemoError(f"--image: not a readable picture: {reason}") from None


def parse_focus(text: str | None, size: tuple[int, int], *, default_photo: bool) -> tuple[float, float]:
    """The focus in pixels: `0.6,0.7` (both with a dot) are fractions of width and height, `360,280` are pixels."""
    width, height = size
    if text is None:
        x, y = DEFAULT_FOCUS if default_photo else (0.5, 0.5)
        return x * width, y * height
    parts = [part.strip() for part in text.split(",")]
    try:
        x, y = (float(part) for part in parts)
    except ValueError:
        raise DemoError(f"--focus: expected X,Y, got {text!r}") from None
    dots = sum("." in part for part in parts)
    if dots == 1:
        raise DemoError(f"--focus: give two fractions (0.5,0.5) or two pixels (200,150), got {text!r}")
    if dots == 2:
        x, y = x * width, y * height
    if not (math.isfinite(x) and math.isfinite(y) and 0 <= x <= width and 0 <= y <= height):
        raise DemoError(f"--focus: {text} is outside the photo, which is {width} x {height} pixels")
    return x, y


def crop_square(image: Image.Image, focus: tuple[float, float]) -> tuple[Image.Image, tuple[float, float]]:
    """The central square, moved just as far as the focus needs; and the focus in fractions of that square."""
    side = min(image.size)
    corner = [round(min(max((length - side) / 2, at - side), at)) for length, at in zip(image.size, focus, strict=True)]
    left, top = (min(max(c, 0), length - side) for c, length in zip(corner, image.size, strict=True))
    x, y = ((at - start) / side for at, start in zip(focus, (left, top), strict=True))
    return image.crop((left, top, left + side, top + side)), (min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0))
