"""LLaVA-NeXT: a thumbnail and crops of each image, unpadded, with newline tokens; a CLIP tower, or SigLIP."""

from torch import Tensor

from ..families import Family, Inputs, Layout, Model, register_family
from .llava import core_of, decoder_of
from .packing import Pack, packed_pictures, packed_scores
from .pictures import encoded_with, layout_of_pictures, values_of_pictures
from .towers import TowerSaliency


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    (pack,) = encoded_with(inputs, "pack_image_features")
    return layout_of_pictures({core.config.image_token_id: packed_pictures(core, pack)}, inputs, counts)


class PackedSaliency(TowerSaliency):
    """Of each crop, packed as the crops are; newline tokens have none."""

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        (pack,) = encoded_with(inputs, "pack_image_features")
        values = packed_scores(core, pack, self.seen[-1])
        return values_of_pictures({core.config.image_token_id: values}, inputs, counts)


register_family(
    Family(
        name="LLaVA-NeXT",
        core=core_of,
        decoder=decoder_of,
        visual_ids=lambda config: (config.image_token_id,),
        layout=layout,
        saliency=PackedSaliency,
        watched={"pack_image_features": Pack.seen},
    ),
    "llava_next",
)
