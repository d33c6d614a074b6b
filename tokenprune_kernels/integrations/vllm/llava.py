"""LLaVA-1.5 in the engine: a grid of patches per image."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava as engine
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..transformers.layout import Patches, grid_patches
from .llava_like import PrunedLlava, check_classes
from .placeholders import FewerPlaceholders

check_classes(engine.LlavaForConditionalGeneration, engine.LlavaMultiModalProcessor)


class Processor(FewerPlaceholders, engine.LlavaMultiModalProcessor):  # type: ignore[misc]
    pass


def processor_of(info: Any, dummy_inputs: Any) -> Processor:
    if not isinstance(info, engine.LlavaProcessingInfo):
        raise NotImplementedError(
            "tokenprune_kernels: images of a LLaVA with a Pixtral tower cannot be pruned: tokens that end their rows "
            "stand between them"
        )
    return Processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    processor_of,
    info=engine._build_llava_or_pixtral_hf_info,
    dummy_inputs=engine.LlavaDummyInputsBuilder,
)
class LlavaForConditionalGeneration(PrunedLlava, engine.LlavaForConditionalGeneration):  # type: ignore[misc]
    def layouts(self, image_input: Any) -> Sequence[Sequence[Patches]]:
        patch = self.config.vision_config.patch_size
        images, _, height, width = image_input["pixel_values"].shape
        return [[grid_patches(height // patch, width // patch, 0)]] * images

    def saliencies(self, image_input: Any, scores: Tensor) -> Sequence[Tensor]:
        return list(scores)
