"""The engine on a CPU: its runner does not ask models whose encoders hand positions on for them."""

import functools
from typing import Any

from .checks import check_method

FLAG = "is_multimodal_pruning_enabled"


def complete(runner: type) -> None:
    """Makes a runner whose `load_model` leaves the flag out set it, as the engine's runner of GPUs does.

    Where `load_model` sets it, or was completed before, nothing is changed.
    """
    check_method(runner, "load_model")
    load = runner.load_model  # type: ignore[attr-defined]
    if getattr(load, "completed", False) or FLAG in load.__code__.co_names:
        return

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **keywords: Any) -> None:
        load(self, *args, **keywords)
        config = self.model_config.multimodal_config
        able = getattr(self.get_model(), "supports_multimodal_pruning", False)
        setattr(self, FLAG, able and config is not None and getattr(config, FLAG)())

    load_model.completed = True  # type: ignore[attr-defined]
    runner.load_model = load_model  # type: ignore[attr-defined]
