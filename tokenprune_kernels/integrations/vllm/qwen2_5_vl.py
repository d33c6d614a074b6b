"""Qwen2.5-VL in the engine; requests with videos are refused."""

from vllm.model_executor.models import qwen2_5_vl as engine
from vllm.multimodal import MULTIMODAL_REGISTRY

from .mrope import ImagesOnly, PrunedQwen, check_mrope
from .placeholders import FewerPlaceholders

check_mrope(engine.Qwen2_5_VLForConditionalGeneration, engine.Qwen2_5_VLMultiModalProcessor)


class Info(ImagesOnly, engine.Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    pass


class Processor(FewerPlaceholders, engine.Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=engine.Qwen2_5_VLDummyInputsBuilder)
class Qwen2_5_VLForConditionalGeneration(  # noqa: N801
    PrunedQwen,
    engine.Qwen2_5_VLForConditionalGeneration,  # type: ignore[misc]
):
    pass
