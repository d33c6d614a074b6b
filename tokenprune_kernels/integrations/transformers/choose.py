"""What the functions of a method are given in front of a decoder layer, and the visual tokens that they choose."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import gather_compact, indices_to_mask, mask_to_indices
from ..._convert import samples_of
from ...methods import Selection, Stage
from .cache import Before
from .families import Family, input_norm
from .layout import Layout
from .parallel import all_features
from .saved import Told, told_by
from .tokens import Tokens, joined

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
    """All that is known in front of the decoder layer where tokens are chosen. Callables: made when asked for.

    sample [R]: which sample a row of visual tokens belongs to, when rows are images (`of_images`): then `visual`,
    `origin` and `counts` of the tokens have R rows. before: the keys that are cached in front of the columns.
    """

    tokens: Tokens
    hidden: Tensor  # [B, L, C]
    layer: Any  # the decoder layer, a module
    attention: AttentionInputs | None
    projected: Callable[[], AttentionInputs]  # what the layer itself makes of `hidden`
    embedded: Callable[[], Embedded]
    layout: Callable[[], Layout]  # of the unpruned visual tokens, on the device
    saliency: Callable[[], Tensor]  # [B, V] of the unpruned visual tokens
    generator: Callable[[], torch.Generator | None]
    causal: bool = True  # whether the text behind the images sees no token behind itself
    sample: Tensor | None = None
    before: Before = field(default_factory=Before)

    def taken(self, values: Tensor, index: Tensor) -> Tensor:
        """[R, V, ...] of values [B, N, ...]: for each row, those at `index` [R, V] of its sample; 0 for -1."""
        if self.sample is None:
            return gather_compact([values], index, dims=[1])[0]
        index = at_rows(index, self.sample * values.shape[1])
        (taken,) = gather_compact([values.flatten(0, 1).unsqueeze(0)], index.view(1, -1), dims=[1])
        return taken.view(*index.shape, *values.shape[2:])

    @cached_property
    def features(self) -> Tensor:
        """[R, V, C]: the hidden states of the visual tokens."""
        return self.taken(self.hidden, self.tokens.visual)

    def by_origin(self, values: Tensor) -> Tensor:
        """Values that are known for every unpruned visual token, for those that are left."""
        return self.taken(values, self.tokens.origin)

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
        """[B, T]: the keys that are the text rows' own."""
        t, held = self.tokens, self.before.length
        return torch.arange(held + self.first_text, held + t.length, device=t.slot.device).expand(len(t.counts), -1)

    def key_indices(self) -> Tensor:
        """[R, V]: the keys of the visual tokens."""
        visual = self.tokens.visual
        return torch.where(visual < 0, visual, visual + self.before.length)

    def key_mask(self) -> Tensor | None:
        """[B, L] bool, of all keys; None when there is no padding."""
        t = self.tokens
        return joined(
            [(self.before.real, self.before.length), (t.real, t.length)], len(self.hidden), self.hidden.device
        )

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


# How each of `methods.ARGUMENTS` is made: what is known of the samples, with a row for each,
OF_SAMPLES: dict[str, Callable[[LayerContext], Any]] = {
    "query": lambda c: _seen(c).query[:, :, c.first_text :],
    "key": lambda c: _seen(c).key,
    "scale": lambda c: _seen(c).scale,
    "next_query": lambda c: c.projected().query[:, :, c.first_text :],
    "next_key": lambda c: c.projected().key,
    "next_scale": lambda c: c.projected().scale,
    "lse": LayerContext.lse,
    "causal": lambda c: c.causal,
    "layout": lambda c: "bhld",
    "key_mask": LayerContext.key_mask,
    "query_positions": LayerContext.query_positions,
    "query_mask": lambda c: c.text_mask,
    "text_embeddings": lambda c: c.hidden[:, c.first_text :],
    "text_mask": lambda c: c.text_mask,
    "input_features": lambda c: c.embedded().visual(),
    "input_text": lambda c: c.embedded().since(c.first_text),
    "input_mask": lambda c: c.embedded().tokens.visual_mask(),
    "generator": lambda c: c.generator(),
}
# and of the visual tokens, with a row for each sample or image.
OF_TOKENS: dict[str, Callable[[LayerContext], Any]] = {
    "key_indices": LayerContext.key_indices,
    "features": lambda c: c.features,
    "visual_embeddings": lambda c: c.features,
    "unrotated_key": LayerContext.unrotated_key,
    "saliency": lambda c: c.by_origin(c.saliency()),
    "positions": lambda c: c.by_origin(c.layout().positions),
    "grid": lambda c: c.by_origin(c.layout().grids),
    "groups": lambda c: c.by_origin(c.layout().groups),
    "stacked_positions": LayerContext.stacked_positions,
    "mask": lambda c: c.tokens.visual_mask(),
    "present": lambda c: c.tokens.visual >= 0,
    "n": lambda c: c.tokens.visual.shape[1],
    "count": lambda c: max(c.tokens.counts),
}
SOURCES = OF_SAMPLES | OF_TOKENS
# Those of tokens that are on a grid.
ON_GRID = frozenset({"positions", "grid", "stacked_positions"})


def check_stage(method: str, stage: Stage, layer: Any, family: Family) -> None:
    """Whether a decoder layer has what a function asks of it."""
    if "unrotated_key" in stage.uses and not hasattr(layer.self_attn, "k_proj"):
        raise NotImplementedError(
            f"prune_visual_tokens: {method} compares keys before RoPE, and {type(layer.self_attn).__name__} has no "
            "k_proj that makes them alone"
        )
    if stage.projects and family.normed is input_norm and not hasattr(layer, "input_layernorm"):
        raise NotImplementedError(
            f"prune_visual_tokens: {method} reads queries and keys of the layer that comes, and {type(layer).__name__} "
            "has no input_layernorm in front of its attention"
        )


class Chosen(NamedTuple):
    """indices [B, K] among the visual tokens, ascending, -1 after the last; K is the largest budget of a sample.

    Of a method that merges what it drops, else None: merged [B, K, C] are the rows that take the place of the kept
    tokens' own, sizes [B, K] how many tokens each of them stands for, if the method says so. told: by each call.
    """

    indices: Tensor
    merged: Tensor | None
    sizes: Tensor | None
    told: list[Told]


def choose(
    stage: Stage, context: LayerContext, left: list[list[int]], budgets: list[list[int]], options: dict[str, Any]
) -> Chosen:
    """What a stage keeps: of each sample, so many of all that is left or, in lists of several, of each of its images.

    Images are chosen from by themselves, as samples are. Rows with the same budget, and the same `count` where that is
    asked for, are one batched call.
    """
    by_image = any(len(parts) != 1 for parts in left)
    sample = [b for b, parts in enumerate(left) for _ in parts]
    start = [sum(parts[:i]) for parts in left for i in range(len(parts))]
    flat = [k for parts in budgets for k in parts]
    rows = of_images(context, sample, start, [n for parts in left for n in parts]) if by_image else context
    of_rows = {name: source in OF_TOKENS for name, source in stage.arguments.items()}
    made = {n: SOURCES[source](rows if of_rows[n] else context) for n, source in stage.arguments.items()}
    options = {name: value for name, value in options.items() if name in stage.options}
    present = rows.tokens.visual >= 0
    of_call = [name for name, source in stage.arguments.items() if source == "count"]
    alike = list(zip(flat, rows.tokens.counts if of_call else flat, strict=True))
    found = []
    for k, count in sorted({pair for pair in alike if pair[0] > 0}):
        at = [row for row, pair in enumerate(alike) if pair == (k, count)]
        of_at = [sample[row] for row in at]
        given = {name: _rows(value, at if of_rows[name] else of_at) for name, value in made.items()}
        given |= dict.fromkeys(of_call, count)
        result = stage.function(k=k, **given, **options)
        indices = _indices(stage.name, result, k, _rows(present, at))
        merged, sizes = _merged(stage.name, result, (len(at), k, context.hidden.shape[2]), present.device)
        told = told_by(result, k, _rows(rows.tokens.origin, at), of_at)
        found.append((at, Chosen(indices, merged, sizes, told)))
        if len(at) == len(left) and not by_image:
            return found[-1][1]
    batch, most = context.tokens.visual.shape
    first = torch.tensor([b * most + s for b, s in zip(sample, start, strict=True)])
    first = first.to(present.device, non_blocking=True)
    # Tokens are counted through all samples, and a row behind the last takes what has no place.
    token = torch.cat([at_rows(chosen.indices, samples_of(first, at)).flatten() for at, chosen in found])
    stays = indices_to_mask(token.unsqueeze(0), batch * most).view(batch, most)
    indices, _ = mask_to_indices(stays, max(map(sum, budgets)))

    def by_sample(parts: list[Tensor | None]) -> Tensor | None:
        given = [part.flatten(0, 1) for part in parts if part is not None]
        if not given:
            return None
        values = given[0].new_zeros((batch * most + 1, *given[0].shape[1:]))
        values[token] = torch.cat(given)
        return gather_compact([values[:-1].unflatten(0, (batch, most))], indices, dims=[1])[0]

    told = [one for _, chosen in found for one in chosen.told]
    merged, sizes = (by_sample([getattr(chosen, n) for _, chosen in found]) for n in ("merged", "sizes"))
    return Chosen(indices, merged, sizes, told)


def at_rows(index: Tensor, start: Tensor) -> Tensor:
    """index [R, K] counted on from `start` [R]; -1 stays."""
    return torch.where(index >= 0, index + start.unsqueeze(1), -1)


def of_images(context: LayerContext, sample: list[int], start: list[int], counts: list[int]) -> LayerContext:
    """The context with a row for each image: of which sample, which of its visual tokens is the first, and how many."""
    tokens = context.tokens
    of_sample, first, count = torch.tensor([sample, start, counts]).to(context.hidden.device, non_blocking=True)
    slot = torch.arange(max(counts), device=count.device)
    index = torch.where(slot < count.unsqueeze(1), first.unsqueeze(1) + slot, -1)
    rows = replace(context, sample=of_sample)
    visual, origin = (rows.taken(t + 1, index) - 1 for t in (tokens.visual, tokens.origin))
    return replace(rows, tokens=replace(tokens, visual=visual, origin=origin, counts=counts))


def _rows(value: Any, rows: list[int]) -> Any:
    """These rows of a tensor, without a copy of all rows or of one that is repeated; anything else as it is."""
    if not isinstance(value, Tensor) or rows == list(range(len(value))):
        return value
    if len(set(rows)) == 1:
        return value[rows[0]].expand(len(rows), *value.shape[1:])
    return samples_of(value, rows)


def _merged(
    name: str, result: Any, wanted: tuple[int, int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """`merged` [B, k, C] and `sizes` [B, k] of a `Selection`, or None where the kept tokens stay as they are."""
    merged, sizes = (result.merged, result.sizes) if isinstance(result, Selection) else (None, None)
    if sizes is not None and (sizes.shape != wanted[:2] or sizes.device != device):
        raise ValueError(
            f"prune_visual_tokens: sizes of {name} must have shape [B, k] = {list(wanted[:2])} on {device}, "
            f"got {list(sizes.shape)} on {sizes.device}"
        )
    if merged is not None and (merged.shape != wanted or merged.device != device):
        raise ValueError(
            f"prune_visual_tokens: merged of {name} must have shape [B, k, C] = {list(wanted)} on {device}, "
            f"got {list(merged.shape)} on {merged.device}"
        )
    return merged, sizes


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
