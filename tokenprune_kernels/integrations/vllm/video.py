"""vLLM's own pruning of videos, EVS and VidCom2, by our ops.

The engine's models import the functions by name, so that every module that has loaded is looked through for them, and
those that load later import ours.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..retention import COUNT, MASK, Retention, engine_function, evs_retention, vidcom2_retention

SERVED_BY = {
    "vllm.multimodal.video_prune.evs": evs_retention,
    "vllm.multimodal.video_prune.vidcom2": vidcom2_retention,
}
_registered: list[tuple[Retention, Retention]] = []  # the engine's functions, each with ours


def register_video() -> None:
    """Serve vLLM's `--video-pruning-rate`, with either `--video-pruning-method`, by the ops of this package.

    The tokens that stay are the engine's in float32, up to ties; in bfloat16 they are those of float64, where rounding
    decides the engine's. To be called in every process of the engine, as a general plug-in is. Twice is once.

    Raises:
        NotImplementedError: this vLLM has other functions than these are written for; nothing is changed then.
    """
    if _registered:
        return

    def known(module: str, name: str) -> Callable[..., Any]:
        return engine_function("register_video", module, name)

    # The list is complete before it is looked at: one unknown function leaves everything as it was.
    _registered.extend([(known(module, MASK), serve(known(module, COUNT))) for module, serve in SERVED_BY.items()])
    for engine, ours in _registered:
        _rebind(engine, ours)


def unregister_video() -> None:
    """Give the engine its functions back."""
    while _registered:
        engine, ours = _registered.pop()
        _rebind(ours, engine)


def _rebind(old: Retention, new: Retention) -> None:
    """In every loaded module, whatever name is bound to `old` becomes `new`."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)
