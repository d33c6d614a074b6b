"""Dropping tokens of a cache that the caller chose himself."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .cache import compact_layers, pruned_of


def compact_cache(cache: Any, indices: Tensor) -> Any:
    """Keep these tokens in every layer of a transformers cache; on the GPU, one launch for all of them.

    Keys keep the rotary positions that they were made with, so that what comes next has to be numbered from the old
    length on, or the positions passed. -1 becomes a key and a value of zeros: the cache has no mask, and an attention
    that is not told (`attention_mask[b, n]` False) looks at it.

    Args:
        cache: a DynamicCache whose layers hold all tokens; it is changed. Layers that are empty stay empty.
        indices: [B, K] int64, ascending, of the tokens in the cache; -1: none.

    Returns:
        the cache, with K tokens in every layer.

    Raises:
        TypeError: no cache, or one with layers that hold a window or compressed states.
        ValueError: `indices` is not [B, K], or B is not that of the cache.
        IndexError: an index outside the cache; on GPUs only with TOKENPRUNE_CHECK_INDICES=1.

    >>> import torch
    >>> from transformers import DynamicCache
    >>> from tokenprune_kernels.integrations.transformers import compact_cache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0)
    >>> compact_cache(cache, torch.tensor([[0, 3, 4]])).get_seq_length()
    3
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise TypeError(f"compact_cache: cache must be a transformers DynamicCache, got {type(cache).__name__}")
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if others:
        raise TypeError(
            f"compact_cache: cache must have layers that hold every token (DynamicLayer), got {', '.join(others)}; "
            "prune_visual_tokens drops tokens before they get there"
        )
    if pruned_of(cache) is not None:
        raise TypeError(
            "compact_cache: cache must not hold a prompt that prune_visual_tokens has pruned, got one; "
            "prune_visual_tokens(..., compact_cache=True) drops in it what was not selected"
        )
    compact_layers(cache, [i for i, layer in enumerate(layers) if layer.get_seq_length()], indices)
    return cache
