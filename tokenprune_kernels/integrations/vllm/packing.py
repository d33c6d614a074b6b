"""LLaVA-NeXT and LLaVA-OneVision in the engine: a thumbnail and crops of an image, packed by the code of the engine."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..transformers.adapters.packing import Pack, packed_images, packed_scores
from ..transformers.layout import Patches
from .checks import check_method
from .llava_like import PrunedLlava, check_classes


@dataclass(frozen=True)
class EnginePack(Pack):
    """What `_merge_image_patch_embeddings` of the engine's model is called with, once for each image."""

    def run(self, core: Any, features: Sequence[Tensor], newline: float) -> list[Tensor]:
        merge = type(core)._merge_image_patch_embeddings
        filled = features[0].new_full(features[0].shape[-1:], newline)
        # LLaVA-NeXT takes the newline from the model, LLaVA-OneVision from an argument.
        model = SimpleNamespace(config=core.config, image_newline=filled)
        given = {"image_newline": filled} if "image_newline" in inspect.signature(merge).parameters else {}
        return [
            merge(model, torch.tensor(size), each, strategy="spatial_unpad", **given)
            for size, each in zip(self.sizes, features, strict=True)
        ]


def check_packing(model: type, processor: type) -> None:
    check_classes(model, processor)
    check_method(model, "_merge_image_patch_embeddings", "image_size", "patch_embeddings", "strategy")


class PackedLlava(PrunedLlava):
    def layouts(self, image_input: Any) -> Sequence[Sequence[Patches]]:
        return packed_images(self, self._pack(image_input))

    def saliencies(self, image_input: Any, scores: Tensor) -> Sequence[Tensor]:
        return packed_scores(self, self._pack(image_input), scores)

    def _pack(self, image_input: Any) -> EnginePack:
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        crops = [(len(each), patches) for each in image_input["pixel_values"]]
        return EnginePack(crops, image_input["image_sizes"].tolist(), {})
