"""SGLang's own pruning of videos, EVS, by our ops: a plug-in of the group `sglang.srt.plugins`.

Written against the source of SGLang 0.5.23 and tested with stand-ins for it; it has not run in the engine.
"""

import functools
import importlib

from .retention import COUNT, MASK, engine_function, evs_retention

EVS = "sglang.srt.multimodal.evs"


@functools.cache
def register() -> None:
    """Replace SGLang's `compute_retention_mask` by ours, through the engine's registry of hooks.

    The tokens that stay are the engine's in float32; in bfloat16 they are those of float64, where the engine's are
    decided by rounding. The engine applies the hook after all plug-ins have loaded, in each of its processes.

    Raises:
        RuntimeError: this SGLang has other functions than these are written for; nothing is registered then.
    """
    for module in ("evs_core", "evs_module"):  # where the function is defined, and where the engine calls it
        engine_function("sglang.register", f"{EVS}.{module}", MASK)
    count = engine_function("sglang.register", f"{EVS}.evs_core", COUNT)
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(f"{EVS}.evs_module.{MASK}", evs_retention(count), hooks.HookType.REPLACE)
