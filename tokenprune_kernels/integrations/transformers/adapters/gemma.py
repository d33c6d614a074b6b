"""PaliGemma and Gemma 3: images of one size by SigLIP; the tokens of an image, or all of a prompt, see each other."""

from torch import Tensor, nn

from ..families import WINDOW_LAYERS, WINDOWS, Family, Inputs, Model, Saliency
from ..layout import Layout
from .images import equal_grids, grid_layout, sizes_seen, values_of_run
from .towers import attention_in, tower_scores, window_means


def pooled_layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """An image is as many tokens whatever its size, and so is each crop of pan and scan, an image of its own here."""
    side = core.multi_modal_projector.tokens_per_side
    return equal_grids(counts, side, side)


def pooled_scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """[images, tokens]: the mean over the patches that the projector averages to a token."""
    side = core.multi_modal_projector.patches_per_image
    return window_means(tower_scores(core, query, key, scale), side, core.multi_modal_projector.kernel_size)


def last_attention(core: Model) -> nn.Module:
    return attention_in(core.vision_tower, -1)


FAMILIES = (
    Family(
        name="PaliGemma",
        model_types=("paligemma",),
        layout=grid_layout,
        grid="a grid per image",
        saliency=Saliency("mean attention received in the last layer", last_attention, tower_scores, values_of_run),
        watched={"get_image_features": sizes_seen},
        prefix="token_type_ids",
        layer_types=WINDOWS,
        cache_layers=WINDOW_LAYERS,
    ),
    Family(
        name="Gemma 3",
        model_types=("gemma3",),
        layout=pooled_layout,
        grid="a grid per image, of `mm_tokens_per_image`; each crop of pan and scan is an image",
        saliency=Saliency(
            "mean attention received in the last layer, averaged like the features",
            last_attention, pooled_scores, values_of_run,
        ),
        layer_types=WINDOWS,
        cache_layers=WINDOW_LAYERS,
    ),
)  # fmt: skip
