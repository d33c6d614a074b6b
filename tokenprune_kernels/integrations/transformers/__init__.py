"""Visual-token pruning inside Hugging Face transformers models; docs/transformers.md."""

from .compact import compact_cache
from .pruning import METHODS, Pruning, prune_visual_tokens

__all__ = ["METHODS", "Pruning", "compact_cache", "prune_visual_tokens"]
