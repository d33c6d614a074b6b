"""The shapes that real models give our ops. Every benchmark takes its sizes from the package's table."""

from tokenprune_kernels.quick.shapes import MODELS, Model

__all__ = ["MODELS", "Model"]
