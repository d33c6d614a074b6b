"""What the kept tokens see of an image: as boxes, and as an image in which only that is bright."""

from typing import Any

import torch
from torch import Tensor

from .layout import Layout


def boxes_of(layout: Layout, kept: Tensor, sample: int, image: int) -> Tensor:
    """[K, 4] float32 on the host: left, top, right, bottom in parts of the image. Boxes of crops may overlap."""
    chosen = kept[sample].cpu()
    chosen = chosen[chosen >= 0]
    boxes = layout.boxes[sample].cpu()[chosen]
    boxes = boxes[layout.images[sample].cpu()[chosen] == image]
    if bool(boxes.isnan().any()):
        raise NotImplementedError(
            f"prune_visual_tokens: image {image} of sample {sample} came in tiles, and how they were arranged "
            "cannot be told from them and their thumbnail"
        )
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]  # a newline token sees nothing


def overlay(image: Any, boxes: Tensor) -> Any:
    from PIL import Image

    shown = image.convert("RGB") if isinstance(image, Image.Image) else Image.open(image).convert("RGB")
    mask = Image.new("L", shown.size, 0)
    size = torch.tensor([shown.width, shown.height, shown.width, shown.height])
    for left, top, right, bottom in (boxes * size).round().int().tolist():
        mask.paste(255, (left, top, max(right, left + 1), max(bottom, top + 1)))
    dark = Image.blend(shown, Image.new("RGB", shown.size, (0, 0, 0)), 0.75)
    return Image.composite(shown, dark, mask)
