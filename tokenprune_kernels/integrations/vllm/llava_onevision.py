"""LLaVA-OneVision in the engine; its videos keep all their tokens."""

from vllm.model_executor.models import llava_onevision as engine
from vllm.multimodal import MULTIMODAL_REGISTRY

from .packing import PackedLlava, check_packing
from .placeholders import FewerPlaceholders

check_packing(engine.LlavaOnevisionForConditionalGeneration, engine.LlavaOnevisionMultiModalProcessor)


class Processor(FewerPlaceholders, engine.LlavaOnevisionMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=engine.LlavaOnevisionProcessingInfo, dummy_inputs=engine.LlavaOnevisionDummyInputsBuilder
)
class LlavaOnevisionForConditionalGeneration(PackedLlava, engine.LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    pass
