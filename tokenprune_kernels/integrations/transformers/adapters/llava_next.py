"""LLaVA-NeXT: a thumbnail and crops of each image, unpadded, with newline tokens; a CLIP tower with a class token."""

import torch
from torch import Tensor

from ..families import Family, Inputs, Layout, Model, register_family
from .llava import PAPER_LAYERS, ClassTokenSaliency, core_of, decoder_of
from .packing import Pack, pack_of, packed_pictures, packed_scores
from .pictures import layout_of_pictures, values_of_pictures


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    return layout_of_pictures({core.config.image_token_id: packed_pictures(core, pack_of(inputs))}, inputs, counts)


class PackedClassTokenSaliency(ClassTokenSaliency):
    """The class token's attention of each crop, packed as the crops are; newline tokens have none."""

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        pack = pack_of(inputs)
        crops = sum(crops for crops, _ in pack.crops)
        scores = torch.cat(self.seen).unflatten(0, (-1, pack.crops[0][1]))[-crops:]
        return values_of_pictures({core.config.image_token_id: packed_scores(core, pack, scores)}, inputs, counts)


register_family(
    Family(
        name="LLaVA-NeXT",
        core=core_of,
        decoder=decoder_of,
        visual_ids=lambda config: (config.image_token_id,),
        layout=layout,
        saliency=PackedClassTokenSaliency,
        layers=PAPER_LAYERS,
        watched={"pack_image_features": Pack.seen},
    ),
    "llava_next",
)
