"""Visual-token pruning inside the vLLM engine, as a plug-in of its group `vllm.general_plugins`; docs/vllm.md.

The engine calls `register` in each of its processes. Without TOKENPRUNE_VLLM in the environment it does nothing.
"""

import os

from .setting import VARIABLE, Setting, parse

__all__ = ["VARIABLE", "Setting", "parse", "register"]


def register() -> None:
    """What the entry point names. Called again, it changes nothing.

    Raises:
        ValueError, TypeError: TOKENPRUNE_VLLM is wrong; the engine does not start.
        NotImplementedError: this version of vLLM is not known.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return
    setting = parse(text)
    if setting.method is not None:
        from .choice import check_setting

        check_setting(setting)
    # All is checked before the engine is touched.
    if setting.video:
        from .video import register_video

        register_video()
    if setting.method is not None:
        from .engine import register_models

        register_models()
