"""One module per model family; importing this package registers them."""

from . import internvl, llava, llava_next, llava_onevision

__all__ = ["internvl", "llava", "llava_next", "llava_onevision"]
