"""Visual-token pruning inside Hugging Face transformers models; docs/transformers.md."""

from .compact import compact_cache
from .pruning import METHODS, Pruning, prune_visual_tokens
from .targets import Flops, Milliseconds, decoder_flops

__all__ = ["METHODS", "Flops", "Milliseconds", "Pruning", "compact_cache", "decoder_flops", "prune_visual_tokens"]
