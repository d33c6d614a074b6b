"""The table of model families."""

from torch import nn

from .adapters import internvl, llava, llava_next, llava_onevision, qwen_vl
from .families import Family

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Serves the models of these types from now on; the last family of a type counts."""
    _FAMILIES.update(dict.fromkeys(family.model_types, family))


for _adapter in (llava, llava_next, llava_onevision, qwen_vl, internvl):
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
        raise NotImplementedError(
            f"prune_visual_tokens: {called} (model_type {model_type!r}) is not supported; supported are "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    return family
