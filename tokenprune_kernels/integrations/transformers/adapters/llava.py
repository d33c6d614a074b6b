"""LLaVA-1.5: one grid of patches per image, a CLIP tower with a class token."""

import math
from typing import Any

import torch
from torch import Tensor

from ....ops import cross_attention_scores
from ..families import Family, Inputs, Layout, Model, Saliency, by_sample, grid_patches, layout_of, register_family

PAPER_LAYERS = {"coast": 2, "sts": 2, "adaptprune": 2, "fastv": 2}


def core_of(model: Model) -> Model:
    """The multimodal model below a language-modelling head, or the model itself."""
    return model.model if hasattr(model, "lm_head") else model


def decoder_of(core: Model) -> Model:
    decoder = core.language_model
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Every image has the same square grid."""
    vision = core.config.vision_config
    side = vision.image_size // vision.patch_size
    samples = []
    for count in counts:
        images, rest = divmod(count, side * side)
        if rest:  # the tower was given pictures of another size
            side = math.isqrt(count)
            images, rest = divmod(count, side * side)
        if rest:
            raise NotImplementedError(f"prune_visual_tokens: {count} visual tokens are no number of square grids")
        samples.append([grid_patches(side, side, image) for image in range(images)])
    return layout_of(samples, max(counts, default=0))


class ClassTokenSaliency(Saliency):
    """The class token's attention in the layer whose features the model takes, averaged over heads (AdaFV)."""

    def __init__(self, core: Model) -> None:
        tower = core.vision_tower
        layers: Any = getattr(tower, "vision_model", tower).encoder.layers
        chosen = core.config.vision_feature_layer
        last = chosen if isinstance(chosen, int) else chosen[-1]
        # hidden_states[i] is what layer i - 1 gives; the attention of that layer is meant, as hidden_states[-2] is
        # named together with attentions[-2].
        super().__init__(core.config.vision_config, layers[last if last < 0 else last - 1].self_attn)

    def see(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]) -> None:
        with torch.no_grad():
            scores, _, _ = cross_attention_scores(query[:, :, :1], key, scale=scale, query_reduction="last")
        self.seen.append(scores[:, 1:].flatten())

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        return by_sample(torch.cat(self.seen), counts)


register_family(
    Family(
        name="LLaVA-1.5",
        core=core_of,
        decoder=decoder_of,
        visual_ids=lambda config: (config.image_token_id,),
        layout=layout,
        saliency=ClassTokenSaliency,
        layers=PAPER_LAYERS,
    ),
    "llava",
)
