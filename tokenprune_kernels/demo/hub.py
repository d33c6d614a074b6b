"""Checkpoints by their id on the Hugging Face hub: those in the local cache, without a connection."""

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from . import DemoError


def cached(name: str) -> Path | None:
    """The folder of the newest snapshot that the cache has of a checkpoint; None when this cannot be an id."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    if not isinstance(found, str):
        raise DemoError(
            f"--model: no such folder, and not in the cache of the hub ({constants.HF_HUB_CACHE}): {name}; nothing is "
            f"downloaded here, to do that run: hf download {name}"
        )
    return Path(found).parent
