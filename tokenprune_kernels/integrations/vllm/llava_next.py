"""LLaVA-NeXT in the engine."""

from vllm.model_executor.models import llava_next as engine
from vllm.multimodal import MULTIMODAL_REGISTRY

from .packing import PackedLlava, check_packing
from .placeholders import FewerPlaceholders

check_packing(engine.LlavaNextForConditionalGeneration, engine.LlavaNextMultiModalProcessor)


class Processor(FewerPlaceholders, engine.LlavaNextMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=engine.LlavaNextProcessingInfo, dummy_inputs=engine.LlavaDummyInputsBuilder
)
class LlavaNextForConditionalGeneration(PackedLlava, engine.LlavaNextForConditionalGeneration):  # type: ignore[misc]
    pass
