"""`python -m tokenprune_kernels demo`: a question about an image, answered with all visual tokens and with some."""

from .._command import CommandError as DemoError

__all__ = ["DemoError"]
