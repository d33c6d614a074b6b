"""Key/value caches: what a prefill leaves on them for decoding, and dropping tokens afterwards."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from ... import gather_compact
from .attention import base_of
from .families import Family
from .tokens import Tokens

# Attributes of the cache itself: they go with copies of it, and from one block to the next.
_MARK = "_tokenprune_pruned"
# Static layers of older versions count the places that are not zero, as the keys of padding are, and write where the
# model's cache_position says, which is the first layer's.
_STATIC = "cumulative_length" in vars(StaticLayer(max_cache_len=1))
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
class Before:
    """What every layer had cached in front of the prompt: `length` columns, real [B, length] bool, False for padding;
    None when there is none."""

    length: int = 0
    real: Tensor | None = None


@dataclass(frozen=True)
class Pruned:
    """What decoding on a cache has to know of its prefill."""

    length: int  # columns of the conversation up to the end of the prompt, before it was pruned
    padded: Tensor  # [B]: how many columns of the prompt are padding in front
    segments: list[Segment]
    # The model's position of the next token: [B] if it is one-dimensional, [R, B] if its position_ids have R rows.
    next_position: Tensor
    before: Before = field(default_factory=Before)

    def segment_of(self, layer: int) -> Segment | None:
        return next((s for s in reversed(self.segments) if s.first <= layer), None)

    def length_at(self, layer: int) -> int:
        """Of `length`, the columns in the cache of a layer."""
        segment = self.segment_of(layer)
        return self.length if segment is None else self.before.length + segment.tokens.length

    def since(self, cache: Any) -> int:
        """Tokens that came after the prompt, whatever the layers' lengths are."""
        counting = [index for index, layer in enumerate(cache.layers) if counts(layer)]
        since, *others = {layer_length(cache, i) - self.length_at(i) for i in (counting[0], counting[-1])}
        if since < 0 or others:
            raise RuntimeError(
                "prune_visual_tokens: this cache was cropped, into its pruned prompt or its layers by different "
                "numbers of tokens"
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
        real = self.before.real
        before = replace(self.before, real=None if real is None else real.expand(batch, -1))
        position = self.next_position.expand(*self.next_position.shape[:-1], batch)
        return Pruned(self.length, self.padded.expand(batch), segments, position, before)


class _OfConversation:
    """What a cache becomes when a pruned prompt is in it: its length is that of the conversation.

    generate cuts off as much of a conversation as this length says; a layer's cache may hold less.
    """

    def get_seq_length(self: Any, layer_idx: int = 0) -> Any:
        held = super().get_seq_length(layer_idx)  # type: ignore[misc]
        pruned = pruned_of(self)
        # A static layer's is a tensor. Reading its value would wait for the device, and break a compiled graph.
        if pruned is None or layer_idx:
            return held
        first = next(index for index, layer in enumerate(self.layers) if counts(layer))
        return held + (pruned.length - pruned.length_at(first))

    def crop(self: Any, length: int) -> None:
        """Crop to a length of the conversation, or by so many tokens if it is negative, as before transformers 5.20."""
        surplus = int(self.get_seq_length()) - length if length > 0 else -length
        if surplus > 0:
            super().crop(-surplus)  # type: ignore[misc]

    def reset(self: Any) -> None:
        take_windows_back(self, filled=False)
        super().reset()  # type: ignore[misc]
        if not layer_length(self, 0):  # some versions zero what there is
            vars(self).pop(_MARK, None)


class PrunedCache(_OfConversation, DynamicCache):
    def get_mask_sizes(self: Any, query: Any, layer_idx: int = 0) -> tuple[int, int]:
        """A mask that the model makes with the length of the conversation has a column for each of its tokens."""
        length, offset = super().get_mask_sizes(query, layer_idx)
        return length + (0 if layer_idx else int(self.get_seq_length() - layer_length(self, 0))), offset


class PrunedStaticCache(_OfConversation, StaticCache):
    pass


_PRUNED: dict[type, type] = {DynamicCache: PrunedCache, StaticCache: PrunedStaticCache}


def remember(cache: Any, pruned: Pruned) -> None:
    setattr(cache, _MARK, pruned)
    cache.__class__ = _PRUNED.get(type(cache), type(cache))  # the caller's object, who will hand it to generate


def pruned_of(cache: Any) -> Pruned | None:
    pruned: Pruned | None = getattr(cache, _MARK, None)
    return pruned


def _holds_all(family: Family) -> bool:
    """Whether every layer of a cache has one column for each token."""
    return family.cache_layers == (DynamicLayer,)


def check_cache(cache: Any, family: Family, config: Any, *, compact: bool) -> None:
    """Whether the family's models can be pruned on this cache. config: the decoder's."""
    if cache is None:
        return
    kinds: dict[type, tuple[type, ...]] = {DynamicCache: family.cache_layers}
    if _STATIC and _holds_all(family):
        kinds[StaticCache] = (StaticLayer,)
    kind = next((plain for plain in kinds if type(cache) in (plain, _PRUNED[plain])), None)
    others = {type(layer).__name__ for layer in cache.layers if type(layer) not in kinds[kind]} if kind else set()
    if kind is None or others:
        known = (f"a {k.__name__} of {'s or '.join(n.__name__ for n in layers)}s" for k, layers in kinds.items())
        what = ", ".join(sorted(others)) or type(cache).__name__
        raise NotImplementedError(f"prune_visual_tokens: the cache must be {' or '.join(known)}, got {what}")
    offloaded, name = getattr(cache, "offloading", False), base_of(config._attn_implementation)
    if compact and offloaded:
        raise NotImplementedError("prune_visual_tokens: compact_cache=True does not go with an offloaded cache")
    if kind is StaticCache and (offloaded or name not in ("sdpa", "eager")):
        raise NotImplementedError(
            "prune_visual_tokens: a static cache must not be offloaded, and needs sdpa or eager attention, whose masks "
            f"hide its free places; got {'one that is offloaded' if offloaded else repr(name)}"
        )


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


def before_prompt(cache: Any, family: Family, mask: Tensor | None) -> Before:
    """What is cached in front of a prompt that will be pruned; mask [B, L]: of both."""
    held = layer_length(cache, 0)
    if not held:
        return Before()
    if not _holds_all(family):
        raise NotImplementedError(
            "prune_visual_tokens: images behind a cached prompt need a decoder whose layers all keep every token, and "
            f"{family.name} has others; put the whole prompt through at once"
        )
    lengths = [layer_length(cache, layer) for layer in range(len(cache.layers))]
    if set(lengths) != {held}:
        raise RuntimeError(f"prune_visual_tokens: the layers of the cache hold different numbers of tokens, {lengths}")
    real = None if mask is None else mask[:, :held].bool()
    return Before(held, None if real is None or bool(real.all()) else real)


def over_free_places(mask: Any, cache: Any, layer: int, queries: int, keys: int, device: torch.device) -> Any:
    """A mask [B, 1, queries, keys] or None, for all that the attention of a layer gets of its cache.

    A static one hands out its free places too, behind the keys. A first prefill needs no mask for them: sdpa attends
    causally from the first key on.
    """
    place = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
    if not isinstance(place, StaticLayer) or (mask is None and keys == queries > 1):
        return mask
    if mask is None:
        mask = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=device).tril(keys - queries)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (0, place.max_cache_len - keys), value=hidden)


def compact_layers(cache: Any, layers: Iterable[int], columns: Tensor) -> None:
    """Keep only these columns [B, L'] of the keys and values of these layers: one launch for all of them."""
    chosen = [(cache.layers[i], layer_length(cache, i)) for i in layers if counts(cache.layers[i])]
    if not chosen:
        return
    tensors = [t[:, :, :length] for layer, length in chosen for t in (layer.keys, layer.values)]
    kept = gather_compact(tensors, columns, dims=[2] * len(tensors))
    for (layer, _), keys, values in zip(chosen, kept[::2], kept[1::2], strict=True):
        static = isinstance(layer, StaticLayer)
        if static:  # compiled code knows its tensors by their addresses
            layer.keys[:, :, : keys.shape[2]], layer.values[:, :, : values.shape[2]] = keys, values
            layer.cumulative_length.fill_(keys.shape[2])
        else:
            layer.keys, layer.values = keys, values
