"""DeepSeek-VL and Janus: images of one size, each patch a token, by SigLIP or a tower like it."""

from torch import Tensor

from ..families import Family, Inputs, Model, Saliency
from .images import grid_layout, sizes_seen, values_of_run
from .towers import attention_in, mean_attention


def received(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """[images, patches]"""
    return mean_attention(query, key, scale)


FAMILIES = (
    Family(
        name="DeepSeek-VL",
        model_types=("deepseek_vl", "deepseek_vl_hybrid", "janus"),
        layout=grid_layout,
        grid="a grid per image",
        saliency=Saliency(
            "mean attention received in the last layer",
            lambda core: attention_in(core.vision_model, -1), received, values_of_run,
        ),
        watched={"get_image_features": sizes_seen},
    ),
)  # fmt: skip
