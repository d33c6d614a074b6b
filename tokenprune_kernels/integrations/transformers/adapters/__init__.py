"""One module per model family; importing this package registers them."""

from . import llava

__all__ = ["llava"]
