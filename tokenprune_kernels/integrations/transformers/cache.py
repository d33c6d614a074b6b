"""Key/value caches: what a prefill leaves on them for decoding, and dropping tokens afterwards."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ... import gather_compact
from .families import Family
from .tokens import Tokens

# Attributes of the cache itself: they go with copies of it, and from one block to the next.
_MARK = "_tokenprune_pruned"
_WINDOWS = "_tokenprune_windows"  # {layer: its own cache, empty}, while one that cuts nothing is in its place


@dataclass(frozen=True)
class Segment:
    """From decoder layer `first` on, the sequence is `tokens`.

    columns [B, L]: where they were in the prompt, -1 for padding.
    next_position [B]: the position of the next token, of layers inside the model that number positions anew; None in
    those where it is the model's. bias [B, V]: what the attention adds to the logits of a key, for each visual token of
    the unpruned prompt; None: nothing.
    """

    first: int
    tokens: Tokens
    columns: Tensor
    next_position: Tensor | None = None
    bias: Tensor | None = None

    def bias_of_columns(self) -> Tensor | None:
        """[B, L]; 0 for text."""
        return None if self.bias is None else gather_compact([self.bias], self.tokens.prompt_slot(), dims=[1])[0]


@dataclass(frozen=True)
class Pruned:
    """What decoding on a cache has to know of its prefill."""

    length: int  # columns of the prompt before it was pruned
    padded: Tensor  # [B]: how many of them are padding in front
    segments: list[Segment]
    # The model's position of the next token: [B] if it is one-dimensional, [R, B] if its position_ids have R rows.
    next_position: Tensor

    def segment_of(self, layer: int) -> Segment | None:
        return next((s for s in reversed(self.segments) if s.first <= layer), None)

    def length_at(self, layer: int) -> int:
        """Columns of the prompt in the cache of a layer."""
        segment = self.segment_of(layer)
        return self.length if segment is None else segment.tokens.length

    def since(self, cache: Any) -> int:
        """Tokens that came after the prompt, whatever the layers' lengths are."""
        counting = [index for index, layer in enumerate(cache.layers) if counts(layer)]
        since, *others = {layer_length(cache, i) - self.length_at(i) for i in (counting[0], counting[-1])}
        if since < 0 or others:
            raise RuntimeError(
                "prune_visual_tokens: this cache was cropped, into its pruned prompt or its layers by different "
                "numbers of tokens; assisted decoding does so and is not supported"
            )
        return since

    def of_batch(self, batch: int) -> "Pruned":
        """One prompt may have been repeated; of several, the order of the repeats would be a guess."""
        rows = self.next_position.shape[-1]
        if rows == batch:
            return self
        if rows != 1:
            raise RuntimeError(f"prune_visual_tokens: the cache holds {rows} pruned prompts, the batch has {batch}")
        segments = []
        for segment in self.segments:
            real = segment.tokens.real
            real = None if real is None else real.expand(batch, -1)
            position = None if segment.next_position is None else segment.next_position.expand(batch)
            columns = segment.columns.expand(batch, -1)
            segments.append(
                replace(segment, tokens=replace(segment.tokens, real=real), columns=columns, next_position=position)
            )
        position = self.next_position.expand(*self.next_position.shape[:-1], batch)
        return Pruned(self.length, self.padded.expand(batch), segments, position)


class PrunedCache(DynamicCache):
    """What a cache becomes when a pruned prompt is in it: its length is that of the conversation.

    generate cuts off as much of a conversation as this length says; a layer's cache may hold less.
    """

    def get_seq_length(self, layer_idx: int = 0) -> int:
        pruned = pruned_of(self)
        if pruned is None or layer_idx:
            return super().get_seq_length(layer_idx)
        return pruned.length + pruned.since(self)

    def crop(self, length: int) -> None:
        """Crop to a length of the conversation, or by so many tokens if it is negative, as before transformers 5.20."""
        surplus = self.get_seq_length() - length if length > 0 else -length
        if surplus > 0:
            super().crop(-surplus)

    def reset(self) -> None:
        take_windows_back(self, filled=False)
        super().reset()


def remember(cache: DynamicCache, pruned: Pruned) -> None:
    setattr(cache, _MARK, pruned)
    cache.__class__ = PrunedCache  # the caller's object, who will hand it to generate


def pruned_of(cache: Any) -> Pruned | None:
    pruned: Pruned | None = getattr(cache, _MARK, None)
    return pruned if pruned is not None and layer_length(cache, 0) else None  # empty: it was reset


def check_cache(cache: Any, family: Family, *, compact: bool) -> None:
    """Whether the family's models can be pruned on this cache."""
    if cache is None:
        return
    others = {type(layer).__name__ for layer in getattr(cache, "layers", []) if type(layer) not in family.cache_layers}
    if type(cache) not in (DynamicCache, PrunedCache) or others:
        what = ", ".join(sorted(others)) or type(cache).__name__
        known = " or ".join(f"{layer.__name__}s" for layer in family.cache_layers)
        raise NotImplementedError(f"prune_visual_tokens: the cache must be a DynamicCache of {known}, got {what}")
    if compact and getattr(cache, "offloading", False):
        raise NotImplementedError("prune_visual_tokens: compact_cache=True does not go with an offloaded cache")


def counts(layer: Any) -> bool:
    """Whether a layer of a cache counts its tokens; linear attention has a state in their place."""
    return hasattr(layer, "get_seq_length")


def free_windows(cache: Any, layers: Iterable[int]) -> None:
    """Empty layers that keep a number of tokens as wide as a window get one that keeps all in their place.

    Some of these tokens are gone, so that the last so many reach further back than the window; masks cut at it.
    """
    taken: dict[int, Any] = vars(cache).setdefault(_WINDOWS, {})
    for index in layers:
        if index < len(cache.layers) and getattr(cache.layers[index], "is_sliding", False):
            taken[index], cache.layers[index] = cache.layers[index], DynamicLayer()


def take_windows_back(cache: Any, *, filled: bool) -> None:
    """The inverse of `free_windows`. filled: with what the layers in their place hold, of an unpruned prompt."""
    for index, layer in vars(cache).pop(_WINDOWS, {}).items():
        if filled and layer_length(cache, index):
            layer.update(cache.layers[index].keys, cache.layers[index].values)
        cache.layers[index] = layer


def layer_length(cache: Any, layer: int) -> int:
    """Tokens in the cache of a layer, or of the next one that counts them."""
    there = [] if cache is None else cache.layers[layer:]
    return int(next((each.get_seq_length() for each in there if counts(each)), 0))


def compact_layers(cache: Any, layers: Iterable[int], columns: Tensor) -> None:
    """Keep only these columns [B, L'] of the keys and values of these layers: one launch for all of them."""
    chosen = [cache.layers[index] for index in layers if counts(cache.layers[index])]
    if not chosen:
        return
    tensors = [t for layer in chosen for t in (layer.keys, layer.values)]
    kept = gather_compact(tensors, columns, dims=[2] * len(tensors))
    for layer, keys, values in zip(chosen, kept[::2], kept[1::2], strict=True):
        layer.keys, layer.values = keys, values
