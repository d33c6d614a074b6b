"""Reading the user's image."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import DemoError


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow clips deeper grey images at 255; they are stretched from their darkest to their brightest value."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    span = max(values.max() - values.min(), 1e-12)
    return Image.fromarray(((values - values.min()) * (255 / span)).round().astype(np.uint8))


def load(path: Path) -> Image.Image:
    """The image in RGB, upright."""
    if (scheme := str(path).partition(":/")[0]) in ("http", "https", "file"):
        raise DemoError(f"--image: takes the path of a file and loads nothing from an address, got {scheme}:")
    if not path.is_file():
        raise DemoError(f"--image: {'not a file' if path.exists() else 'no such file'}: {path}")
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
        raise DemoError(f"--image: not a readable image: {reason}") from None
