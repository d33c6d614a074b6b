"""Aya Vision and Command A Vision: tiles of an image and a thumbnail, each pixel-shuffled, by SigLIP.

Of their decoder's layers most have windows, and the others no rotation.
"""

from torch import Tensor

from ..families import WINDOW_LAYERS, WINDOWS, Family, Inputs, Model, Saliency
from ..layout import Layout
from .images import equal_grids, values_of_run
from .towers import attention_of, check_grid, tower_scores, window_means


def _side(core: Model) -> int:
    """Patches along a side of a tile; tiles have one size."""
    vision = core.config.vision_config
    return int(vision.image_size // vision.patch_size)


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Each tile is a group and an image of its own: how the processor has cut an image is not told."""
    check_grid(core)
    side = _side(core) // core.config.downsample_factor
    return equal_grids(counts, side, side)


def scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """[tiles, tokens]: the mean over the patches that the pixel shuffle makes one token of."""
    return window_means(tower_scores(core, query, key, scale), _side(core), core.config.downsample_factor)


FAMILIES = (
    Family(
        name="Aya Vision",
        model_types=("aya_vision", "cohere2_vision"),
        layout=layout,
        grid="a grid per tile, after the pixel shuffle; each tile is an image",
        saliency=Saliency(
            "mean attention received in layer `vision_feature_layer`, its mean over the patches of a token",
            attention_of, scores, values_of_run,
        ),
        layer_types=WINDOWS,
        cache_layers=WINDOW_LAYERS,
    ),
)  # fmt: skip
