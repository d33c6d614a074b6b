"""Key/value caches: which are supported, and dropping tokens of layers that were filled before the pruning layer."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ... import gather_compact


def check_cache(cache: Any) -> None:
    """Layers must be free to have different lengths, and hold their keys and values as they are."""
    if cache is None:
        return
    others = {type(layer).__name__ for layer in getattr(cache, "layers", []) if type(layer) is not DynamicLayer}
    if type(cache) is not DynamicCache or others:
        what = ", ".join(sorted(others)) or type(cache).__name__
        raise NotImplementedError(f"prune_visual_tokens: the cache must be a DynamicCache of DynamicLayers, got {what}")


def layer_length(cache: Any, layer: int) -> int:
    """Tokens in the cache of a layer."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[layer].get_seq_length())


def compact_layers(cache: Any, layers: Iterable[int], columns: Tensor) -> None:
    """Keep only these columns [B, L'] of the keys and values of these layers: one launch for all of them."""
    chosen = [cache.layers[index] for index in layers]
    tensors = [t for layer in chosen for t in (layer.keys, layer.values)]
    kept = gather_compact(tensors, columns, dims=[2] * len(tensors))
    for layer, keys, values in zip(chosen, kept[::2], kept[1::2], strict=True):
        layer.keys, layer.values = keys, values
