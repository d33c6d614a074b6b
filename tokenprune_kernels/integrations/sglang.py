"""SGLang's own pruning of videos, EVS, by our ops: a plug-in of the group `sglang.srt.plugins`.

Written against the source of SGLang 0.5.23 and tested with stand-ins for it; it has not run in the engine.
"""

import functools
import importlib
import os

from .retention import COUNT, MASK, engine_function, evs_retention

VARIABLE = "TOKENPRUNE_SGLANG"
EVS = "sglang.srt.multimodal.evs"


@functools.cache
def register() -> None:
    """What the entry point names: with TOKENPRUNE_SGLANG=video=on, the engine's EVS is served by our ops.

    The tokens that stay are the engine's in float32, up to ties; in bfloat16 they are those of float64, where rounding
    decides the engine's. The engine calls this in each of its processes, and applies the hook after all plug-ins have
    loaded. Without the variable nothing happens. Twice is once.

    Raises:
        ValueError: TOKENPRUNE_SGLANG is something else.
        NotImplementedError: this SGLang has other functions than these are written for; nothing is registered then.
    """
    setting = os.environ.get(VARIABLE, "").strip()
    if setting not in ("", "video=on"):
        raise ValueError(f"{VARIABLE}: must be video=on or empty, got {setting!r}")
    if not setting:
        return
    for module in ("evs_core", "evs_module"):  # where the function is defined, and where the engine calls it
        engine_function("sglang.register", f"{EVS}.{module}", MASK)
    count = engine_function("sglang.register", f"{EVS}.evs_core", COUNT)
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(f"{EVS}.evs_module.{MASK}", evs_retention(count), hooks.HookType.REPLACE)
