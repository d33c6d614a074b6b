"""What the kept tokens see of images: as boxes, and as images in which only that is bright."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, images_of
from .report import Report

COLUMNS, GAP = 4, 8  # of a sheet of several images; pixels


def tokens_of(layout: Layout, tokens: Tensor, sample: int, image: int) -> tuple[Tensor, Tensor]:
    """Those of a sample's visual tokens [K] that see something of an image, and what: left, top, right, bottom in parts
    of it, [N, 4] float32 on the host. Boxes of crops may overlap."""
    tokens = tokens.cpu()
    tokens = tokens[tokens >= 0]
    tokens = tokens[layout.images[sample].cpu()[tokens] == image]
    boxes = layout.boxes[sample].cpu()[tokens]
    if bool(boxes.isnan().any()):
        raise NotImplementedError(
            f"prune_visual_tokens: image {image} of sample {sample} came in tiles, and how they were arranged "
            "cannot be told from them and their thumbnail"
        )
    there = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])  # a newline token sees nothing
    return tokens[there], boxes[there]


def boxes_of(report: Report, sample: int, image: int) -> Tensor:
    """[K, 4]: what the kept tokens of a sample see of an image."""
    layout, kept = report.shown()
    return tokens_of(layout, kept[sample], sample, image)[1]


def is_several(image: Any) -> bool:
    """A list of images, or the frames of a video as one array [frames, height, width, 3]."""
    return isinstance(image, (list, tuple)) or len(getattr(image, "shape", ())) == 4


def numbered(report: Report, image: Any, sample: int, first: int) -> dict[int, Any]:
    """The images that the user gave, by their numbers in the sample."""
    if not is_several(image):
        return {first: image}
    layout, _ = report.shown()
    there = len(images_of(layout, report.before)[sample]) - first
    if len(image) != there:
        raise ValueError(
            f"prune_visual_tokens: sample {sample} has {there} images or frames from number {first} on, got "
            f"{len(image)}; of a video, give a frame for each that the model sees: [::2] where it merges pairs"
        )
    return dict(enumerate(image, first))


def opened(image: Any) -> Any:
    """A PIL image, in RGB, of one, an array [height, width, 3] of bytes, or anything PIL opens."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if hasattr(image, "shape"):
        import numpy as np

        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                "prune_visual_tokens: an image given as an array must be [height, width, 3] in uint8, got "
                f"{list(pixels.shape)} in {pixels.dtype}"
            )
        return Image.fromarray(pixels)
    return Image.open(image).convert("RGB")


def overlay(image: Any, boxes: Tensor) -> Any:
    from PIL import Image

    shown = opened(image)
    mask = Image.new("L", shown.size, 0)
    size = torch.tensor([shown.width, shown.height, shown.width, shown.height])
    for left, top, right, bottom in (boxes * size).round().int().tolist():
        mask.paste(255, (left, top, max(right, left + 1), max(bottom, top + 1)))
    dark = Image.blend(shown, Image.new("RGB", shown.size, (0, 0, 0)), 0.75)
    return Image.composite(shown, dark, mask)


def sheet(images: Sequence[Any]) -> Any:
    """PIL images beside each other, in rows of at most `COLUMNS`."""
    from PIL import Image

    columns = min(COLUMNS, len(images))
    width, height = (max(image.size[axis] for image in images) + GAP for axis in (0, 1))
    whole = Image.new("RGB", (columns * width - GAP, -(-len(images) // columns) * height - GAP))
    for number, image in enumerate(images):
        whole.paste(image, (number % columns * width, number // columns * height))
    return whole


def overlays(report: Report, image: Any, sample: int, first: int) -> Any:
    """One image, or a sheet of several."""
    images = numbered(report, image, sample, first).items()
    shown = [overlay(one, boxes_of(report, sample, number)) for number, one in images]
    return sheet(shown) if is_several(image) else shown[0]
