"""The table of model families."""

from torch import nn

from .adapters import gemma, gemma4, internvl, llama4, llava, llava_next, llava_onevision, mistral3, qwen_vl
from .families import Family

_FAMILIES: dict[str, Family] = {}

# What is missing for types that are asked for and not served.
_LACKING = {
    "gemma3n": "its hidden states are stacks of several a token (AltUp), and its vision tower is one of timm",
}


def register_family(family: Family) -> None:
    """Serves the models of these types from now on; the last family of a type counts."""
    _FAMILIES.update(dict.fromkeys(family.model_types, family))


for _adapter in (llava, llava_next, llava_onevision, qwen_vl, internvl, mistral3, gemma, gemma4, llama4):
    for _family in _adapter.FAMILIES:
        register_family(_family)


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
    config = getattr(unwrapped(model), "config", None)
    return family_of_type(getattr(config, "model_type", None), type(model).__name__)


def family_of_type(model_type: str | None, called: str) -> Family:
    """The family of a model_type, known before the weights are loaded. called: the model's name in the error."""
    family = _FAMILIES.get(str(model_type))
    if family is None:
        why = f": {_LACKING[str(model_type)]}" if str(model_type) in _LACKING else ""
        raise NotImplementedError(
            f"prune_visual_tokens: {called} (model_type {model_type!r}) is not supported{why}; supported are "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    return family
