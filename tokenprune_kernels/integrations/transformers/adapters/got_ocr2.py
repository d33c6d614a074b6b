"""GOT-OCR 2: images or crops of one size by a tower as SAM's, whose attention is not read; two convolutions behind it
halve the grid of patches twice."""

from ..families import Family, Inputs, Model
from ..layout import Layout
from .images import equal_grids


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Each crop is a group and an image of its own."""
    vision = core.config.vision_config
    side = -(-(vision.image_size // vision.patch_size) // 4)
    return equal_grids(counts, side, side)


FAMILIES = (
    Family(
        name="GOT-OCR 2",
        model_types=("got_ocr2",),
        layout=layout,
        grid="a grid per image, of the projector's convolutions; each crop is an image",
        saliency=None,
    ),
)
