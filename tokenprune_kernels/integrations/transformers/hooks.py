"""The hooks of one block: they watch the prompt arrive, drop tokens in front of a layer, and keep decoding in step.

A prefill is a call of the decoder with an empty cache. In front of a pruning layer the hidden states, the rotary
embeddings and the padding lose the dropped columns; every later layer gets the shortened ones in place of what the
model's loop hands it. Decoding needs two corrections: the position of new tokens, and the mask of layers whose cache is
shorter than the first layer's.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ... import gather_compact
from ..._backend import served_by
from .attention import Probe, ShownAttention
from .cache import Pruned, Segment, check_cache, compact_layers, layer_length, only_new, pruned_of, remember
from .choose import ON_ATTENTION, ON_LAYOUT, Moment, Shown, choose
from .deepstack import DeepStack
from .families import LAYOUT_INPUTS, Encoded, Family, Inputs, Layout, Saliency, unwrapped
from .masks import causal_mask, check_full_attention, check_one_sequence
from .report import Report
from .tokens import Tokens, keep, read_prompt
from .watch import Watch

_PICTURE_LATER = (
    "prune_visual_tokens: pictures must come in the first forward on an empty cache, not in a later turn or chunk"
)


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
        # Each may be what is called: a PEFT model skips the hooks of the model that it wraps, generate those of PEFT.
        self._heads = [head for head in dict.fromkeys((model, unwrapped(model))) if head is not core]
        self._family, self._core = family, core
        self._decoder: Any = decoder  # a module whose attributes depend on the family
        self._stages = {stage.layer: stage for stage in stages}
        self._renumber, self._compact_cache, self._seed, self._options = renumber, compact_cache, seed, options
        self._handles: list[Any] = []
        self._attention: list[ShownAttention] = []
        self._watches = [Watch(core, name, what) for name, what in family.watched.items()]
        self._saliency: Saliency | None = None
        self._generator: torch.Generator | None = None
        self._encoded = Encoded()
        self._prompt: Prompt | None = None
        self._now: Prefill | Decode | None = None

    # --- entering and leaving --------------------------------------------------------------------------------------

    def install(self) -> None:
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        check_full_attention(self._decoder.config)
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
        for head in self._heads:
            self._before(head, self._before_model)
        self._before(self._core, self._before_core)
        self._after(self._core, self._after_core)
        self._before(self._decoder, self._before_decoder)
        self._after(self._decoder, self._after_decoder)
        for index, layer in enumerate(layers):  # all of them: a cache may have been pruned by another method
            self._before(layer, self._before_layer, index)
        if "deepstack_visual_embeds" in inspect.signature(self._decoder.forward).parameters:
            for index, layer in enumerate(layers):
                hook = _uncompiled(lambda m, a, output, at=index: self._after_layer(at, output))
                self._handles.append(layer.register_forward_hook(hook))

    def _before(self, module: nn.Module, hook: Callable[..., Any], *where: int) -> None:
        def run(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return hook(*where, m, args, kwargs)

        self._handles.append(module.register_forward_pre_hook(_uncompiled(run), with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Runs after an exception too."""
        self._handles.append(module.register_forward_hook(_uncompiled(hook), with_kwargs=True, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._attention:
            self._attention.pop().remove()
        for watch in self._watches:
            watch.remove()
        self._prompt = self._now = self._saliency = self._generator = None
        self._encoded = Encoded()

    # --- the prompt ------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = _bound(module, args, kwargs)
        unfit = [n for n in ("labels", "logits_to_keep") if isinstance(inputs.get(n), Tensor)]
        ids = inputs.get("input_ids")
        if unfit and ids is not None and bool(self._is_visual(ids).any()):
            raise ValueError(
                f"prune_visual_tokens: {unfit[0]} belongs to columns that pruned logits lack; compute the loss "
                "outside, or index the logits from the right end"
            )

    def _is_visual(self, ids: Tensor) -> Tensor:
        visual = self._family.visual_ids(self._core.config)
        is_visual = ids == visual[0]
        for other in visual[1:]:
            is_visual = is_visual | (ids == other)
        return is_visual

    def _before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._prompt = None
        inputs = _bound(module, args, kwargs)
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        pruned = pruned_of(cache)
        if ids is None:
            embeds = inputs.get("inputs_embeds")
            if embeds is not None and embeds.shape[1] > 1 and (cache is None or not cache.get_seq_length()):
                raise NotImplementedError("prune_visual_tokens: needs input_ids to find the visual tokens")
            return None
        changed = None
        if pruned is not None:
            inputs = only_new(inputs, ids, pruned.length + pruned.since(cache))
            changed = None if inputs["input_ids"] is ids else ((), inputs)
        ids = inputs["input_ids"]
        if ids.shape[1] > 1:
            self._prompt = Prompt(inputs, self._is_visual(ids))
        return changed

    def _after_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._prompt = None

    # --- the decoder -----------------------------------------------------------------------------------------------

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._now = None
        prompt, self._prompt = self._prompt, None
        inputs = _bound(module, args, kwargs)
        embeds, cache = inputs.get("inputs_embeds"), inputs.get("past_key_values")
        if embeds is None:
            return None
        pruned = pruned_of(cache)
        if pruned is not None:
            if prompt is not None and bool(prompt.is_visual.any()):
                raise NotImplementedError(_PICTURE_LATER)
            pruned, queries = pruned.of_batch(embeds.shape[0]), embeds.shape[1]
            self._now = Decode(pruned, queries, inputs.get("attention_mask"))
            # Behind the prompt's last position, whatever the caches' lengths are.
            step = torch.arange(queries, device=pruned.next_position.device) + pruned.since(cache)
            inputs["position_ids"] = pruned.next_position.unsqueeze(-1) + step
            if "cache_position" in inputs:  # of the first layer, which may be shorter than the caller knows
                inputs["cache_position"] = None
            return (), inputs
        if prompt is None or embeds.shape[1] < 2:
            return None
        return (), self._begin(prompt, inputs)

    def _begin(self, prompt: Prompt, inputs: Inputs) -> Inputs:
        """A prefill; without visual tokens it is none of ours."""
        mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
        fits = isinstance(mask, Tensor) and mask.shape == prompt.is_visual.shape
        tokens = read_prompt(prompt.is_visual, mask.bool() if isinstance(mask, Tensor) and fits else None)
        if not any(tokens.counts):
            return inputs
        check_cache(cache, compact=self._compact_cache)
        if layer_length(cache, 0):
            raise NotImplementedError(_PICTURE_LATER)
        if mask is not None and not fits:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise NotImplementedError(f"prune_visual_tokens: the attention_mask must be [B, L] or absent, got {got}")
        check_one_sequence(inputs.get("position_ids"), mask)
        modules = (self._decoder, *self._decoder.layers)
        if any(getattr(m, "gradient_checkpointing", False) and m.training for m in modules):
            raise NotImplementedError("prune_visual_tokens: gradient checkpointing; switch it off or call model.eval()")
        seen = {watch.name: watch.last for watch in self._watches}
        called = any(value is not None for value in seen.values())
        prompt.inputs = {**prompt.inputs, **(self._encoded.of(prompt.inputs, seen if called else None) or {})}
        places = {name: prompt.inputs.get(name) for name in (*LAYOUT_INPUTS, *self._family.watched)}
        layout = functools.cache(lambda: self._family.layout(self._core, places, tokens.counts))
        self.report.begin(tokens.slot.device, tokens.counts, layout)
        deepstack = DeepStack.take(inputs, tokens)
        counted = prompt.inputs.get("position_ids") is not None
        self._now = Prefill(tokens, tokens, _next_position(inputs, tokens, counted), prompt, deepstack)
        if deepstack is not None:
            inputs = {**inputs, "deepstack_visual_embeds": None, "visual_pos_masks": None}
        return inputs

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
        cache = getattr(output, "past_key_values", None)
        if isinstance(output, tuple):  # return_dict=False
            cache = next((part for part in output if isinstance(part, Cache)), None)
        if cache is None:
            return
        last = now.segments[-1]
        if self._compact_cache and last.first > 0 and now.columns is not None:
            with self.report.clock("compact_ms"):
                compact_layers(cache, range(last.first), now.columns)
            now.segments = [Segment(0, last.tokens)]
        remember(cache, Pruned(now.original.length, now.segments, now.next_position))

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
        if stage.method in ON_ATTENTION and now.shown is None:
            raise RuntimeError(
                "prune_visual_tokens: the attention before the pruning layer was not seen; the attention "
                "implementation must not change inside the block"
            )
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad(), self.report.clock("select_ms"):
            selected = choose(stage.method, self._moment(now, stage.method, hidden.detach(), layer), budgets)
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

    def _moment(self, now: Prefill, method: str, hidden: Tensor, layer: nn.Module) -> Moment:
        layout = None
        if method in ON_LAYOUT and self.report.layout is not None:
            layout = Layout(*(t.to(hidden.device, non_blocking=True) for t in vars(self.report.layout()).values()))
        saliency = None
        if self._saliency is not None:
            saliency = self._saliency.of_prompt(self._core, now.prompt.inputs, now.original.counts).to(hidden.device)
        if self._seed is not None and self._generator is None:
            # The device of the work: with offloaded weights it is not that of a parameter.
            self._generator = torch.Generator(hidden.device).manual_seed(self._seed)
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
        batch, given, new = hidden.shape[0], now.given_mask, keys - tokens.length
        real, after, padding = tokens.real, None, None
        if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] >= new:
            after = given[:, given.shape[1] - new :].bool()
        if real is not None or after is not None:
            flags = hidden.new_ones((batch, keys), dtype=torch.bool)
            parts = (flags[:, : tokens.length] if real is None else real, flags[:, :new] if after is None else after)
            padding = torch.cat(parts, 1)
        return causal_mask(
            self._decoder.config, batch=batch, queries=now.queries, keys=keys, padding=padding,
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


def _next_position(inputs: Inputs, tokens: Tokens, counted: bool) -> Tensor:
    """Behind the prompt, as the model goes on.

    generate counts positions itself (`counted`), on from the last column. Else the model adds its rope_deltas, behind
    the largest position, which may be an image's. Of several rows, the first of four counts text; the others share it.
    """
    positions = inputs.get("position_ids")
    batch = tokens.slot.shape[0]
    if positions is None:
        return torch.full((batch,), tokens.length, device=tokens.slot.device)
    if counted:
        last: Tensor = positions[..., -1] + 1
        return last.expand(*last.shape[:-1], batch)
    highest: Tensor = positions.amax(-1) + 1
    if highest.dim() == 1:
        return highest.expand(batch)
    axes = highest[-3:].amax(0, keepdim=True).expand(3, -1)
    return (torch.cat([highest[:-3], axes]) if len(highest) > 3 else axes).expand(-1, batch)
