"""LLaVA-1.5: a grid of patches per image. The tower is CLIP or SigLIP, for images of one size, or Pixtral, for any."""

from typing import Any

from torch import Tensor

from ..families import Family, Inputs, Layout, Model, grid_patches, register_family
from .pictures import Picture, encoded_with, layout_of_pictures, values_of_pictures
from .towers import TowerSaliency, check_grid, received_attention


def core_of(model: Model) -> Model:
    """The multimodal model below a language-modelling head, or the model itself."""
    return model.model if hasattr(model, "lm_head") else model


def decoder_of(core: Model) -> Model:
    decoder = core.language_model
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def sizes_seen(arguments: dict[str, Any]) -> Any:
    """Height and width of each picture, in pixels. Pixtral's pictures are padded to the largest of a batch."""
    sizes = arguments.get("image_sizes")
    pixels = arguments.get("pixel_values")
    if sizes is None and pixels is not None:
        return [tuple(pixels.shape[-2:])] * len(pixels)
    return sizes


def grids_of(core: Model, inputs: Inputs) -> list[tuple[int, int]]:
    """Height and width of each picture, in patches."""
    (sizes,) = encoded_with(inputs, "get_image_features")
    if hasattr(sizes, "tolist"):
        sizes = sizes.tolist()
    patch = core.config.vision_config.patch_size
    return [(height // patch, width // patch) for height, width in sizes]


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    check_grid(core)
    pictures = [Picture([grid_patches(height, width, 0)]) for height, width in grids_of(core, inputs)]
    return layout_of_pictures({core.config.image_token_id: pictures}, inputs, counts)


class PictureSaliency(TowerSaliency):
    def see(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]) -> None:
        # Which tokens of a sequence are one picture's is known when the prompt comes.
        self.seen.append((query.detach(), key.detach(), scale))

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        grids = grids_of(core, inputs)
        query, key, scale = self.seen[-1]
        if len(query) == len(grids):
            values = list(self.scores(query, key, scale))
        else:  # Pixtral: the pictures are one sequence, and see only themselves
            lengths = [height * width for height, width in grids]
            values = list(received_attention(query, key, scale, lengths).split(lengths))
        return values_of_pictures({core.config.image_token_id: values}, inputs, counts)


register_family(
    Family(
        name="LLaVA-1.5",
        core=core_of,
        decoder=decoder_of,
        visual_ids=lambda config: (config.image_token_id,),
        layout=layout,
        saliency=PictureSaliency,
        watched={"get_image_features": sizes_seen},
    ),
    "llava",
)
