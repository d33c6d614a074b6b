"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: images and frames as in Qwen-VL, and tokens of sound, which stay."""

from functools import partial

from ..families import Model, core_of
from .frames import RECEIVED, WINDOWED, merged_family


def thinker(model: Model) -> Model:
    core = core_of(model)
    if not hasattr(core, "visual"):
        raise NotImplementedError(
            f"prune_visual_tokens: {type(model).__name__} has no multimodal model with `visual` and `language_model` "
            "below its head; this version of transformers is not supported"
        )
    return core


_omni = partial(merged_family, core=thinker)

FAMILIES = (
    _omni("Qwen2.5-Omni", ("qwen2_5_omni_thinker",), saliency=WINDOWED),
    _omni("Qwen3-Omni", ("qwen3_omni_moe_thinker",), saliency=RECEIVED, deepstack=True),
)
