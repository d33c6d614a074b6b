"""What the functions of a method are given in front of a decoder layer, and the visual tokens that they choose."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import gather_compact, indices_to_mask, mask_to_indices
from ...methods import Selection, Stage
from .layout import Layout
from .parallel import all_features
from .tokens import Tokens

_CHECK_INDICES = os.environ.get("TOKENPRUNE_CHECK_INDICES") == "1"


@dataclass(frozen=True)
class AttentionInputs:
    """Query and key of the attention before the pruning layer, of all rows and keys."""

    query: Tensor
    key: Tensor
    lse: Tensor | None
    scale: float


@dataclass(frozen=True)
class Embedded:
    """What went into the first decoder layer: hidden [B, L0, C] of the unpruned `tokens`."""

    hidden: Tensor
    tokens: Tokens
    columns: Tensor  # [B, L]: which of these columns each column of the current sequence was, -1: padding

    def visual(self) -> Tensor:
        return gather_compact([self.hidden], self.tokens.visual, dims=[1])[0]

    def since(self, first: int) -> Tensor:
        """Of the current columns from `first` on."""
        return gather_compact([self.hidden], self.columns[:, first:], dims=[1])[0]


@dataclass(frozen=True)
class LayerContext:
    """All that is known in front of the decoder layer where tokens are chosen. Callables: made when asked for."""

    tokens: Tokens
    hidden: Tensor  # [B, L, C]
    layer: Any  # the decoder layer, a module
    attention: AttentionInputs | None
    projected: Callable[[], AttentionInputs]  # what the layer itself makes of `hidden`
    embedded: Callable[[], Embedded]
    layout: Callable[[], Layout]  # of the unpruned visual tokens, on the device
    saliency: Callable[[], Tensor]  # [B, V] of the unpruned visual tokens
    generator: Callable[[], torch.Generator | None]

    @cached_property
    def features(self) -> Tensor:
        """[B, V, C]: the hidden states of the visual tokens."""
        return gather_compact([self.hidden], self.tokens.visual, dims=[1])[0]

    def by_origin(self, values: Tensor) -> Tensor:
        """Values that are known for every unpruned visual token, for those that are left."""
        return gather_compact([values], self.tokens.origin, dims=[1])[0]

    def stacked_positions(self) -> Tensor:
        """[B, V, 3]. Crops and frames lie along the third axis, the largest grid's diagonal apart: tokens of equal
        positions in two of them are no neighbours."""
        grids, groups = self.by_origin(self.layout().grids), self.by_origin(self.layout().groups)
        depth = groups.unsqueeze(-1) * grids.norm(dim=-1, keepdim=True).amax(1, keepdim=True)
        return torch.cat([self.by_origin(self.layout().positions), depth], -1)

    @property
    def first_text(self) -> int:
        """The first column behind the images, of the sample whose images end first."""
        return self.tokens.length - self.tokens.suffix

    @cached_property
    def text_mask(self) -> Tensor:
        """[B, T]: which columns from `first_text` on are text behind the images.

        The last real column always is: a prompt may end with an image.
        """
        t = self.tokens
        column = torch.arange(self.first_text, t.length, device=t.slot.device)
        last = t.visual.amax(1, keepdim=True) if t.visual.shape[1] else t.slot.new_full((len(t.counts), 1), -1)
        if t.real is None:
            return (column > last) | (column == t.length - 1)
        real = t.real[:, self.first_text :]
        return (column > last) & real | (column == torch.where(real, column, -1).amax(1, keepdim=True))

    def query_positions(self) -> Tensor:
        """[B, T]: the columns of the text rows."""
        t = self.tokens
        return torch.arange(self.first_text, t.length, device=t.slot.device).expand(len(t.counts), -1)

    def unrotated_key(self) -> Tensor:
        """[B, V, Hkv * D]"""
        k_proj = self.layer.self_attn.k_proj
        return all_features(k_proj, k_proj(self.features))

    def lse(self) -> Tensor | None:
        """[B, H, T]: the log-sum-exp of the text rows."""
        lse = _seen(self).lse
        return None if lse is None else lse[:, :, self.first_text :]


def not_seen() -> RuntimeError:
    return RuntimeError(
        "prune_visual_tokens: the attention of or before the pruning layer was not seen: it was not called through the "
        "attention function that the configuration names"
    )


def _seen(context: LayerContext) -> AttentionInputs:
    if context.attention is None:
        raise not_seen()
    return context.attention


# How each of `methods.ARGUMENTS` is made; tensors begin with the batch.
SOURCES: dict[str, Callable[[LayerContext], Any]] = {
    "query": lambda c: _seen(c).query[:, :, c.first_text :],
    "key": lambda c: _seen(c).key,
    "scale": lambda c: _seen(c).scale,
    "next_query": lambda c: c.projected().query[:, :, c.first_text :],
    "next_key": lambda c: c.projected().key,
    "next_scale": lambda c: c.projected().scale,
    "lse": LayerContext.lse,
    "causal": lambda c: True,
    "key_indices": lambda c: c.tokens.visual,
    "key_mask": lambda c: c.tokens.real,
    "query_positions": LayerContext.query_positions,
    "query_mask": lambda c: c.text_mask,
    "features": lambda c: c.features,
    "visual_embeddings": lambda c: c.features,
    "unrotated_key": LayerContext.unrotated_key,
    "text_embeddings": lambda c: c.hidden[:, c.first_text :],
    "text_mask": lambda c: c.text_mask,
    "input_features": lambda c: c.embedded().visual(),
    "input_text": lambda c: c.embedded().since(c.first_text),
    "input_mask": lambda c: c.embedded().tokens.visual_mask(),
    "saliency": lambda c: c.by_origin(c.saliency()),
    "positions": lambda c: c.by_origin(c.layout().positions),
    "grid": lambda c: c.by_origin(c.layout().grids),
    "groups": lambda c: c.by_origin(c.layout().groups),
    "stacked_positions": LayerContext.stacked_positions,
    "mask": lambda c: c.tokens.visual_mask(),
    "present": lambda c: c.tokens.visual >= 0,
    "n": lambda c: c.tokens.visual.shape[1],
    "count": lambda c: max(c.tokens.counts),
    "generator": lambda c: c.generator(),
}


def check_stage(method: str, stage: Stage, layer: Any) -> None:
    """Whether a decoder layer has what a function asks of it."""
    if "unrotated_key" in stage.uses and not hasattr(layer.self_attn, "k_proj"):
        raise NotImplementedError(
            f"prune_visual_tokens: {method} compares keys before RoPE, and {type(layer.self_attn).__name__} has no "
            "k_proj that makes them alone"
        )
    if stage.projects and not hasattr(layer, "input_layernorm"):
        raise NotImplementedError(
            f"prune_visual_tokens: {method} reads queries and keys of the layer that comes, and {type(layer).__name__} "
            "has no input_layernorm in front of its attention"
        )


class Chosen(NamedTuple):
    """indices [B, K] among the visual tokens, ascending, -1 after the last; K is the largest budget of a sample.

    merged [B, K, C]: the rows that take the place of the kept tokens' own, of a method that merges what it drops.
    """

    indices: Tensor
    merged: Tensor | None


def choose(stage: Stage, context: LayerContext, budgets: list[int], options: dict[str, Any]) -> Chosen:
    """What a stage keeps. Samples with the same budget, and the same `count` where that is asked for, are one call."""
    given = {name: SOURCES[source](context) for name, source in stage.arguments.items()}
    options = {name: value for name, value in options.items() if name in stage.options}
    present = context.tokens.visual >= 0
    of_call = [name for name, source in stage.arguments.items() if source == "count"]
    alike = list(zip(budgets, context.tokens.counts if of_call else budgets, strict=True))
    if len(set(alike)) == 1:
        result = stage.function(k=budgets[0], **given, **options)
        return Chosen(
            _indices(stage.name, result, budgets[0], present), _merged(stage.name, result, budgets[0], context.features)
        )
    indices = present.new_full((len(budgets), max(budgets)), -1, dtype=torch.int64)
    merged: Tensor | None = None
    for k, count in sorted(set(alike)):
        if k == 0:
            continue
        rows = [b for b, of_sample in enumerate(alike) if of_sample == (k, count)]
        part = {name: value[rows] if isinstance(value, Tensor) else value for name, value in given.items()}
        part |= dict.fromkeys(of_call, count)
        result = stage.function(k=k, **part, **options)
        indices[rows, :k] = _indices(stage.name, result, k, present[rows])
        of_rows = _merged(stage.name, result, k, context.features[rows])
        if of_rows is not None:
            if merged is None:
                merged = of_rows.new_zeros((*indices.shape, of_rows.shape[2]))
            merged[rows, :k] = of_rows
    return Chosen(indices, merged)


def _merged(name: str, result: Any, k: int, features: Tensor) -> Tensor | None:
    """[B, k, C] what a `Selection` says that the kept tokens become, or None where they stay as they are."""
    merged = result.merged if isinstance(result, Selection) else None
    wanted = (features.shape[0], k, features.shape[2])
    if merged is not None and (merged.shape != wanted or merged.device != features.device):
        raise ValueError(
            f"prune_visual_tokens: merged of {name} must have shape [B, k, C] = {list(wanted)} on {features.device}, "
            f"got {list(merged.shape)} on {merged.device}"
        )
    return merged


def _indices(name: str, result: Any, k: int, present: Tensor) -> Tensor:
    """[B, k] ascending of what a function returned, whose type, shape and device are checked.

    Values are checked where that waits for no device, or with TOKENPRUNE_CHECK_INDICES=1: k distinct tokens of each
    sample, ascending in a `Selection`.
    """
    ordered = isinstance(result, Selection)
    indices = result.indices if ordered else result
    if not isinstance(indices, Tensor):
        raise TypeError(
            f"prune_visual_tokens: {name} must return indices [B, k] or a Selection, got {type(result).__name__}"
        )
    batch, tokens = present.shape
    if indices.shape != (batch, k) or indices.dtype != torch.int64 or indices.device != present.device:
        raise ValueError(
            f"prune_visual_tokens: {name} must return int64 indices [B, k] = [{batch}, {k}] on {present.device}, got "
            f"{indices.dtype} {list(indices.shape)} on {indices.device}"
        )
    check = indices.device.type == "cpu" or _CHECK_INDICES
    if ordered and not check:
        return indices
    ascending, counts = mask_to_indices(indices_to_mask(indices, tokens) & present, k)
    if check and (bool((counts < k).any()) or (ordered and not torch.equal(ascending, indices))):
        raise ValueError(
            f"prune_visual_tokens: {name} must return k = {k} distinct indices of each sample's visual tokens"
            f"{', ascending in a Selection' if ordered else ''}, got {indices.tolist()}"
        )
    return ascending
