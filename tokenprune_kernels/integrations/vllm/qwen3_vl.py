"""Qwen3-VL in the engine; requests with videos are refused."""

from vllm.model_executor.models import qwen3_vl as engine
from vllm.multimodal import MULTIMODAL_REGISTRY

from .mrope import ImagesOnly, PrunedQwen, check_mrope
from .placeholders import FewerPlaceholders

check_mrope(engine.Qwen3VLForConditionalGeneration, engine.Qwen3VLMultiModalProcessor)


class Info(ImagesOnly, engine.Qwen3VLProcessingInfo):  # type: ignore[misc]
    pass


class Processor(FewerPlaceholders, engine.Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=engine.Qwen3VLDummyInputsBuilder)
class Qwen3VLForConditionalGeneration(PrunedQwen, engine.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    pass
