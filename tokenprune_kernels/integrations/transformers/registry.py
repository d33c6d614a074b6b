"""The table of model families."""

from torch import nn

from .adapters import (
    cohere_vision,
    deepseek_vl,
    gemma,
    gemma3n,
    gemma4,
    glm_vl,
    got_ocr2,
    idefics3,
    internvl,
    lfm2_vl,
    llama4,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    minicpmv,
    mistral3,
    molmo2,
    ovis2,
    paddleocr_vl,
    perception_lm,
    qwen3_5,
    qwen_omni,
    qwen_vl,
    video_llama_3,
    video_llava,
)
from .families import Family

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Serves the models of these types from now on; the last family of a type counts."""
    _FAMILIES.update(dict.fromkeys(family.model_types, family))


_ADAPTERS = (
    llava, llava_next, llava_next_video, llava_onevision, video_llava,
    qwen_vl, qwen3_5, qwen_omni,
    glm_vl,
    internvl,
    idefics3,
    ovis2,
    mistral3,
    gemma, gemma3n, gemma4,
    llama4,
    cohere_vision, deepseek_vl, got_ocr2, lfm2_vl, minicpmv, molmo2, paddleocr_vl, perception_lm,
    video_llama_3,
)  # fmt: skip

for _adapter in _ADAPTERS:
    for _family in _adapter.FAMILIES:
        register_family(_family)

# Of types that are not served: what to load instead, or what is missing.
UNSERVED = {
    "aria": "learned queries make the tokens of an image, which lie on no grid: not proven",
    "blip-2": "learned queries make 32 tokens of an image: little is left to drop",
    "chameleon": "its images are codes of the vocabulary, in place of features",
    "emu3": "its images are codes of the vocabulary, in place of features",
    "ernie4_5_vl_moe": "its experts are chosen by mm_token_type_ids of the whole prompt: not proven",
    "fast_vlm": "its vision tower is one of timm that tells no grid",
    "florence2": "its images go to an encoder, which its decoder attends to: its prompt has no visual tokens to drop",
    "idefics2": "learned queries make 64 tokens of an image, which lie on no grid: not proven",
    "instructblip": "learned queries make 32 tokens of an image: little is left to drop",
    "internvl_chat": "load the checkpoint of the same name that ends in -hf (model_type internvl)",
    "llava_llama": "load the checkpoint of llava-hf (model_type llava, or llava_next for 1.6)",
    "llava_mistral": "load the checkpoint of llava-hf (model_type llava_next)",
    "llava_qwen": "load the checkpoint of llava-hf (model_type llava_onevision)",
    "minicpmv": "its code comes with the checkpoint; of MiniCPM-V, transformers has model_type minicpmv4_6",
    "mllama": "its images are seen through cross-attention: the prompt has no visual tokens to drop",
    "molmo": "its code comes with the checkpoint; of Molmo, transformers has model_type molmo2",
    "ovis": "load the checkpoint that ends in -hf (model_type ovis2)",
    "qwen2_5_omni": "pass model.thinker, and generate without speech, whose talker reads all hidden states",
    "qwen3_omni_moe": "pass model.thinker, and generate without speech, whose talker reads all hidden states",
}


def families() -> list[Family]:
    """Those that are served, in the order of their registration."""
    return list(dict.fromkeys(_FAMILIES.values()))


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, which passes attributes on and calls the forward of what it wraps."""
    while hasattr(type(model), "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    return model


def family_of(model: nn.Module) -> Family:
    """The family of a model, or an error that names what is supported."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        instead = "run a process per device" if isinstance(model, nn.DataParallel) else "prune its module"
        raise NotImplementedError(
            f"prune_visual_tokens: {type(model).__name__} wraps the model and is not supported; {instead}"
        )
    config = getattr(unwrapped(model), "config", None)
    return family_of_type(getattr(config, "model_type", None), type(model).__name__)


def family_of_type(model_type: str | None, called: str) -> Family:
    """The family of a model_type, known before the weights are loaded. called: the model's name in the error."""
    family = _FAMILIES.get(str(model_type))
    if family is None:
        hint = f": {UNSERVED[str(model_type)]}" if str(model_type) in UNSERVED else ""
        raise NotImplementedError(
            f"prune_visual_tokens: {called} (model_type {model_type!r}) is not supported{hint}; supported are "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    return family
