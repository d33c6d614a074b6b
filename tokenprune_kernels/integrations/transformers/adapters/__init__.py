"""One module per model family; importing this package registers them."""

from . import llava, qwen2_vl, qwen3_vl

__all__ = ["llava", "qwen2_vl", "qwen3_vl"]
