"""LLaVA-1.5 in the engine: a grid of patches per image."""

from contextlib import nullcontext
from typing import Any

from vllm.model_executor.models import llava as engine
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..transformers.adapters.towers import check_grid
from ..transformers.layout import grid_patches
from .checks import check_method
from .images import Seen, chooser_of, prune_images, tower_attention, tower_scores, watched
from .placeholders import FewerPlaceholders

check_method(engine.LlavaForConditionalGeneration, "_process_image_input", "image_input")
check_method(engine.LlavaMultiModalProcessor, "_get_mm_hashes", "inputs")
check_method(
    engine.LlavaMultiModalProcessor, "_get_prompt_updates", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"
)


class Processor(FewerPlaceholders, engine.LlavaMultiModalProcessor):
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
class LlavaForConditionalGeneration(engine.LlavaForConditionalGeneration):
    supports_tower_connector_lora = False  # whose tokens the engine would count by placeholders

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        choose = chooser_of(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.choose = choose
        check_grid(self)
        if choose.reads_saliency:
            tower_attention(self)

    def _process_image_input(self, image_input: Any) -> Any:
        seen: Seen = []
        with watched(tower_attention(self), seen) if self.choose.reads_saliency else nullcontext():
            features = super()._process_image_input(image_input)
        patch = self.config.vision_config.patch_size
        height, width = image_input["pixel_values"].shape[-2:]
        return prune_images(
            self.choose,
            features,
            lambda: [[grid_patches(height // patch, width // patch, 0)]] * len(features),
            lambda: tower_scores(self, seen),
        )
