"""One module per model family; importing this package registers them."""

from . import internvl, llava, llava_next, llava_onevision, qwen2_vl, qwen3_vl

__all__ = ["internvl", "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl"]
