"""The hooks of one block: they watch the prompt arrive, drop tokens in front of a layer, and keep decoding in step.

A prefill is a call of the decoder with an empty cache. In front of a pruning layer the hidden states, the rotary
embeddings and the padding lose the dropped columns; every later layer gets the shortened ones in place of what the
model's loop hands it. Decoding needs two corrections: the position of new tokens, and the mask of layers whose cache is
shorter than the first layer's.
"""

import inspect
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ... import gather_compact
from ..._backend import served_by
from .attention import Probe, ShownAttention
from .cache import check_cache, compact_layers, layer_length
from .choose import ON_ATTENTION, Moment, Shown, choose
from .deepstack import DeepStack
from .families import Family, Inputs, Layout, Saliency
from .masks import causal_mask
from .report import Report
from .tokens import Tokens, keep, read_prompt
from .watch import Watch


@dataclass(frozen=True)
class Stage:
    """Tokens are chosen in front of decoder layer `layer`; `budget` maps a prompt's visual tokens to how many stay."""

    layer: int
    method: str
    budget: Callable[[int], int]


@dataclass
class Prompt:
    """What the multimodal model was called with."""

    inputs: Inputs
    is_visual: Tensor  # [B, L] bool


@dataclass
class Segment:
    """From decoder layer `first` on, the sequence is `tokens`."""

    first: int
    tokens: Tokens


@dataclass
class Pruned:
    """What decoding on a cache has to know of its prefill."""

    segments: list[Segment]
    # [B] of a one-dimensional model, [R, B] of one whose position_ids have R rows: where the next token stands.
    next_position: Tensor

    def segment_of(self, layer: int) -> Segment | None:
        return next((s for s in reversed(self.segments) if s.first <= layer), None)


@dataclass
class Prefill:
    tokens: Tokens  # in front of the current layer
    original: Tokens
    next_position: Tensor
    prompt: Prompt
    deepstack: DeepStack | None
    segments: list[Segment] = field(default_factory=list)
    shown: Shown | None = None
    columns: Tensor | None = None  # of the last pruning, into the sequence before it
    # What the layers get instead of the model's, after the first pruning.
    replaced: dict[str, Any] = field(default_factory=dict)


@dataclass
class Decode:
    pruned: Pruned
    queries: int
    given_mask: Tensor | None
    masks: dict[int, Any] = field(default_factory=dict)  # by a segment's first layer


class Hooks:
    def __init__(
        self, model: nn.Module, family: Family, core: nn.Module, decoder: nn.Module, stages: list[Stage], *,
        renumber: bool, compact_cache: bool, seed: int | None, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.report = Report()
        self._model, self._family, self._core = model, family, core
        self._decoder: Any = decoder  # a module whose attributes depend on the family
        self._stages = {stage.layer: stage for stage in stages}
        self._renumber, self._compact_cache, self._seed, self._options = renumber, compact_cache, seed, options
        self._handles: list[Any] = []
        self._attention: list[ShownAttention] = []
        self._watches = [Watch(core, name, what) for name, what in family.watched.items()]
        self._saliency: Saliency | None = None
        self._generator: torch.Generator | None = None
        self._prompt: Prompt | None = None
        self._now: Prefill | Decode | None = None
        self._caches: weakref.WeakKeyDictionary[Any, Pruned] = weakref.WeakKeyDictionary()

    # --- entering and leaving --------------------------------------------------------------------------------------

    def install(self) -> None:
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        config = self._decoder.config
        # Mistral has no layer_types: one window for all layers, or none.
        window = "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"
        kinds = set(getattr(config, "layer_types", None) or [window])
        if kinds != {"full_attention"}:
            raise NotImplementedError(
                f"prune_visual_tokens: decoder layers must all have full attention, got {', '.join(sorted(kinds))}"
            )
        layers = self._decoder.layers
        probes: dict[nn.Module, Probe] = {}
        for stage in self._stages.values():
            if stage.method in ON_ATTENTION:
                probes[layers[stage.layer - 1].self_attn] = self._see
        self._attention.append(ShownAttention(self._decoder.config, probes))
        if any(stage.method == "adafv" for stage in self._stages.values()):
            assert self._family.saliency is not None
            self._saliency = self._family.saliency(self._core)
            self._attention.append(
                ShownAttention(self._saliency.config, {self._saliency.attention: self._saliency.see})
            )
        for attention in list(self._attention):
            attention.install()
        for watch in self._watches:
            watch.install()
        if self._seed is not None:
            device = next(self._decoder.parameters()).device
            self._generator = torch.Generator(device).manual_seed(self._seed)
        if self._model is not self._core:
            self._before(self._model, self._before_model)
        self._before(self._core, self._before_core)
        self._before(self._decoder, self._before_decoder)
        self._handles.append(
            self._decoder.register_forward_hook(_uncompiled(self._after_decoder), with_kwargs=True, always_call=True)
        )
        for index in range(0 if self._compact_cache else min(self._stages), len(layers)):
            self._before(layers[index], self._before_layer, index)
        if "deepstack_visual_embeds" in inspect.signature(self._decoder.forward).parameters:
            for index, layer in enumerate(layers):
                hook = _uncompiled(lambda m, a, output, at=index: self._after_layer(at, output))
                self._handles.append(layer.register_forward_hook(hook))

    def _before(self, module: nn.Module, hook: Callable[..., Any], *where: int) -> None:
        def run(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return hook(*where, m, args, kwargs)

        self._handles.append(module.register_forward_pre_hook(_uncompiled(run), with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._attention:
            self._attention.pop().remove()
        for watch in self._watches:
            watch.remove()
        self._prompt = self._now = self._saliency = None

    # --- the prompt ------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise ValueError("prune_visual_tokens: labels do not fit pruned logits; compute the loss outside")

    def _before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._prompt = None
        inputs = _bound(module, args, kwargs)
        ids = inputs.get("input_ids")
        if ids is None:
            if any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos")):
                raise NotImplementedError("prune_visual_tokens: needs input_ids to find the visual tokens")
            return
        if ids.shape[1] < 2:
            return
        visual = self._family.visual_ids(module.config)
        is_visual = ids == visual[0]
        for other in visual[1:]:
            is_visual = is_visual | (ids == other)
        self._prompt = Prompt(inputs, is_visual)

    # --- the decoder -----------------------------------------------------------------------------------------------

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._now = None
        prompt, self._prompt = self._prompt, None
        inputs = _bound(module, args, kwargs)
        embeds, cache = inputs.get("inputs_embeds"), inputs.get("past_key_values")
        if embeds is None:
            return None
        pruned = self._caches.get(cache) if cache is not None else None
        if pruned is not None:
            self._now = Decode(pruned, embeds.shape[1], inputs.get("attention_mask"))
            if prompt is not None and bool(prompt.is_visual.any()):
                raise NotImplementedError("prune_visual_tokens: a picture after the first turn of a conversation")
            return (), {**inputs, "position_ids": self._decode_positions(pruned, cache, embeds.shape[1])}
        if prompt is None or embeds.shape[1] < 2:
            return None
        return (), self._begin(prompt, inputs)

    def _begin(self, prompt: Prompt, inputs: Inputs) -> Inputs:
        """A prefill; without visual tokens it is none of ours."""
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise NotImplementedError("prune_visual_tokens: the attention_mask must be [B, L] or absent")
        real = None if mask is None else mask.bool()
        tokens = read_prompt(prompt.is_visual, real)
        if not any(tokens.counts):
            return inputs
        check_cache(inputs.get("past_key_values"))
        if getattr(self._decoder, "gradient_checkpointing", False) and self._decoder.training:
            raise NotImplementedError("prune_visual_tokens: gradient checkpointing; switch it off or call model.eval()")
        prompt.inputs = {**prompt.inputs, **{watch.name: watch.last for watch in self._watches}}
        layout = self._family.layout(self._core, prompt.inputs, tokens.counts)
        self.report.begin(tokens.slot.device, tokens.counts, layout)
        deepstack = DeepStack.take(inputs, tokens)
        self._now = Prefill(tokens, tokens, _next_position(inputs, tokens), prompt, deepstack)
        if deepstack is not None:
            inputs = {**inputs, "deepstack_visual_embeds": None, "visual_pos_masks": None}
        return inputs

    def _decode_positions(self, pruned: Pruned, cache: Any, queries: int) -> Tensor:
        """Of the new tokens: the prompt's last position and the tokens since, whatever the caches' lengths are."""
        last = pruned.segments[-1]
        since = layer_length(cache, last.first) - last.tokens.length
        step = torch.arange(since, since + queries, device=pruned.next_position.device)
        return pruned.next_position.unsqueeze(-1) + step

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        now, self._now = self._now, None
        if self._saliency is not None:
            self._saliency.seen.clear()
        for watch in self._watches:
            watch.last = None
        if not isinstance(now, Prefill) or output is None:  # None: the forward raised
            return
        if not now.segments:
            self.report.untouched(now.original.origin)
            return
        cache = getattr(output, "past_key_values", None) or kwargs.get("past_key_values")
        if cache is None:
            return
        last = now.segments[-1]
        if self._compact_cache and last.first > 0 and now.columns is not None:
            with self.report.clock("compact_ms"):
                compact_layers(cache, range(last.first), now.columns)
            now.segments = [Segment(0, last.tokens)]
        with suppress(TypeError):  # a cache without weak references lives only through this call
            self._caches[cache] = Pruned(now.segments, now.next_position)

    # --- the layers ------------------------------------------------------------------------------------------------

    def _see(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]) -> None:
        if isinstance(self._now, Prefill):
            self._now.shown = Shown(query, key, scale, lse)

    def _before_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._now
        if isinstance(now, Decode):
            segment = now.pruned.segment_of(index)
            if segment is None:
                return None
            if segment.first not in now.masks:
                now.masks[segment.first] = self._decode_mask(now, segment, args, kwargs)
            return args, {**kwargs, "attention_mask": now.masks[segment.first], "position_ids": None}
        if not isinstance(now, Prefill):
            return None
        if index in self._stages:
            args, kwargs = self._prune(now, self._stages[index], module, args, kwargs)
        return args, {**kwargs, **now.replaced}

    def _after_layer(self, index: int, output: Any) -> Any:
        now = self._now
        if not isinstance(now, Prefill) or now.deepstack is None:
            return None
        if isinstance(output, tuple):
            return now.deepstack.added(index, output[0], now.tokens), *output[1:]
        return now.deepstack.added(index, output, now.tokens)

    def _prune(
        self, now: Prefill, stage: Stage, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = now.tokens
        budgets = [min(stage.budget(n), left) for n, left in zip(now.original.counts, tokens.counts, strict=True)]
        if budgets == tokens.counts:
            return args, kwargs
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad(), self.report.clock("select_ms"):
            selected = choose(stage.method, self._moment(now, hidden.detach(), layer), budgets)
            after, columns = keep(tokens, selected, budgets)
        now.shown = None
        with self.report.clock("compact_ms"):
            hidden = self._compact(now, after, columns, hidden, kwargs)
        now.tokens, now.columns = after, columns
        now.segments.append(Segment(stage.layer, after))
        self.report.pruned(stage.layer, after.counts, after.origin, served_by(hidden))
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _moment(self, now: Prefill, hidden: Tensor, layer: nn.Module) -> Moment:
        layout = self.report.layout
        if layout is not None:
            layout = Layout(*(t.to(hidden.device, non_blocking=True) for t in vars(layout).values()))
        saliency = None
        if self._saliency is not None:
            saliency = self._saliency.read(self._core, now.prompt.inputs, now.original.counts).to(hidden.device)
        return Moment(now.tokens, hidden, layer, layout, now.shown, saliency, self._generator, self._options)

    def _compact(self, now: Prefill, after: Tokens, columns: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states without the dropped columns; what the layers get besides is left in `now.replaced`."""
        given = {**kwargs, **now.replaced}
        batch = hidden.shape[0]
        rotary = [_with_batch(t, batch) for t in given["position_embeddings"]]
        batch_dims = [t.dim() - 3 for t in rotary]  # [B, L, D] or, one for each axis of the image, [3, B, L, D]
        hidden, *rotary = gather_compact(
            [hidden, *rotary], columns, dims=[1, *(d + 1 for d in batch_dims)], batch_dims=[0, *batch_dims]
        )
        if self._renumber:
            number = torch.arange(after.length, device=hidden.device).expand(batch, -1)
            if after.real is not None:
                number = (after.real.cumsum(1) - 1).clamp_min(0)
            rotary = list(self._decoder.rotary_emb(hidden, position_ids=number))
            now.next_position = number[:, -1] + 1
        now.replaced = {
            "position_embeddings": tuple(rotary),
            # FlashAttention would take gaps in the positions for borders between packed sequences.
            "position_ids": None,
            "attention_mask": causal_mask(
                self._decoder.config, batch=batch, queries=after.length, keys=after.length, padding=after.real,
                dtype=hidden.dtype, device=hidden.device,
            ),
        }  # fmt: skip
        if kwargs.get("cache_position") is not None:
            now.replaced["cache_position"] = torch.arange(after.length, device=hidden.device)
        return hidden

    def _decode_mask(self, now: Decode, segment: Segment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        tokens = segment.tokens
        keys = layer_length(kwargs["past_key_values"], segment.first) + now.queries
        padding = None
        if tokens.real is not None:
            new = tokens.real.new_ones((len(tokens.counts), keys - tokens.length))
            given = now.given_mask
            if isinstance(given, Tensor) and given.dim() == 2 and new.shape[1]:
                new = given[:, -new.shape[1] :].bool()
            padding = torch.cat([tokens.real, new], 1)
        return causal_mask(
            self._decoder.config, batch=hidden.shape[0], queries=now.queries, keys=keys, padding=padding,
            dtype=hidden.dtype, device=hidden.device,
        )  # fmt: skip


def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile leaves hooks to Python: what they remember must not become part of a graph."""
    kept_out: Callable[..., Any] = torch.compiler.disable(hook)
    return kept_out


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """All arguments by name."""
    if not args:
        return dict(kwargs)
    names = [p for p in inspect.signature(module.forward).parameters if p != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _with_batch(t: Tensor, batch: int) -> Tensor:
    """Rotary embeddings are [1, L, D] when every sample has the same positions."""
    return t.expand(*t.shape[:-3], batch, *t.shape[-2:])


def _next_position(inputs: Inputs, tokens: Tokens) -> Tensor:
    """Behind the prompt. Of several rows, the first of four counts text; the others share the largest."""
    positions = inputs.get("position_ids")
    batch = tokens.slot.shape[0]
    if positions is None:
        return torch.full((batch,), tokens.length, device=tokens.slot.device)
    highest: Tensor = positions.amax(-1) + 1
    if highest.dim() == 1:
        return highest.expand(batch)
    axes = highest[-3:].amax(0, keepdim=True).expand(3, -1)
    return (torch.cat([highest[:-3], axes]) if len(highest) > 3 else axes).expand(-1, batch)
