"""Gemma 3n: images of one size by MobileNetV5, which has no attention to read; tokens of sound stay.

A token has several hidden states (AltUp), of which layers attend with one, and an input of each layer's own; the last
layers reuse keys and values of others.
"""

from torch import Tensor

from ..families import SHARING_LAYERS, WINDOWS, Family, Inputs, Model
from ..layout import Layout
from .images import equal_grids


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    return equal_grids(counts, *core.vision_tower.timm_model.msfa.output_resolution)


def normed(layer: Model, hidden: Tensor) -> Tensor:
    """A layer attends with what it predicts of the hidden states that it is given."""
    predicted: Tensor = layer.input_layernorm(layer.altup.predict(hidden)[layer.config.altup_active_idx])
    return predicted


FAMILIES = (
    Family(
        name="Gemma 3n",
        model_types=("gemma3n",),
        layout=layout,
        grid="a grid per image, of the tower's output",
        saliency=None,
        layer_inputs=("per_layer_input",),
        normed=normed,
        stack="altup_active_idx",
        layer_types=WINDOWS,
        cache_layers=SHARING_LAYERS,
    ),
)
