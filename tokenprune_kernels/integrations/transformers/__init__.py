"""Visual-token pruning inside Hugging Face transformers models; docs/transformers.md."""

from .pruning import METHODS, Pruning, prune_visual_tokens

__all__ = ["METHODS", "Pruning", "prune_visual_tokens"]
