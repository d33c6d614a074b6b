"""The engine's models by the names of their architectures, and those that stand in for them."""

import functools
from typing import Any

from .checks import check_method, unsupported
from .runner import complete

# Modules of this package, each with classes of these names; the engine imports one when a checkpoint asks for it.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
}


def register_models() -> None:
    """Puts this package's subclasses in the place of the engine's models; others with images are refused."""
    try:
        from vllm import ModelRegistry
        from vllm.multimodal.registry import MultiModalRegistry
        from vllm.platforms import current_platform
    except ImportError as error:
        raise unsupported(f"vLLM lacks what models are registered with: {error}") from error
    check_method(type(ModelRegistry), "register_model", "model_arch", "model_cls")
    check_method(MultiModalRegistry, "create_processor", "model_config")
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        complete(CPUModelRunner)
    for architecture, module in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__package__}.{module}:{architecture}")
    guard(MultiModalRegistry)


def guard(registry: type) -> None:
    """Makes the registry refuse a model whose images would not be pruned. A second time, it changes nothing."""
    create = registry.create_processor  # type: ignore[attr-defined]
    if getattr(create, "guarded", False):
        return

    @functools.wraps(create)
    def create_processor(self: Any, model_config: Any, *args: Any, **keywords: Any) -> Any:
        from .placeholders import FewerPlaceholders

        processor = create(self, model_config, *args, **keywords)
        if not isinstance(processor, FewerPlaceholders):
            raise NotImplementedError(
                f"tokenprune_kernels: TOKENPRUNE_VLLM is set, and images of {model_config.architecture} cannot be "
                f"pruned; those of {', '.join(ARCHITECTURES)} can"
            )
        return processor

    create_processor.guarded = True  # type: ignore[attr-defined]
    registry.create_processor = create_processor  # type: ignore[attr-defined]
