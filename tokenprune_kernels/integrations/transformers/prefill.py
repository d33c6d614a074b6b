"""One prefill of a block: a call of the decoder with visual tokens, on a cache of which nothing was dropped yet.

In front of a pruning layer the hidden states, the rotary embeddings and the padding lose the dropped columns; every
later layer gets the shortened ones instead of what the model's loop hands it.
"""

import functools
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ... import gather_compact
from ..._backend import served_by
from ...methods import Stage
from .budgets import Budget
from .cache import (
    Before,
    Pruned,
    Segment,
    before_prompt,
    check_cache,
    compact_layers,
    free_windows,
    layer_length,
    remember,
    take_windows_back,
)
from .choose import ON_GRID, AttentionInputs, Embedded, LayerContext, choose, not_seen
from .deepstack import DeepStack, take_deepstack
from .encoding import Asked, ModelCall, Prompt, check_asked
from .families import Family, Inputs, Model, Saliency
from .interface import Arguments, all_rows
from .kinds import FULL, alike, check_counts, kind_of
from .layout import Layout, check_on_grid, images_of
from .masks import check_one_sequence
from .merged import bias_of, with_rows
from .parallel import same_generator
from .report import Report
from .shortened import composed, padded, shortened
from .tokens import Tokens, indices_at, keep, read_prompt
from .training import check_checkpointing

IMAGES_LATER = (
    "prune_visual_tokens: images must come before anything on the cache is pruned, not in a later turn behind a pruned "
    "prompt; put the conversation through again on an empty cache"
)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a method in front of decoder layer `layer`."""

    layer: int
    stage: Stage
    budget: Budget


@dataclass
class Draws:
    """The generator of a block's seed, from entering the block on. A prefill draws all it needs while it holds the
    lock: of prefills in several threads, each gets what some order of them, one after the other, would have given it.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    generator: torch.Generator | None = None

    def of(self, seed: int | None, device: torch.device) -> torch.Generator | None:
        """device: that of the work; with offloaded weights it is not that of a parameter."""
        if seed is not None and self.generator is None:
            self.generator = torch.Generator(device).manual_seed(seed)
        return self.generator


@dataclass(frozen=True)
class Plan:
    """What a block does to every prefill."""

    family: Family
    core: Model
    decoder: Model
    method: str  # for messages
    stages: dict[int, PlannedStage]  # by their layer
    per_image: bool  # budgets are of images and frames, not of samples
    saliency: Saliency | None  # for the methods that ask for it
    renumber: bool
    calibrate: bool
    compact_cache: bool
    seed: int | None
    options: dict[str, Any]
    draws: Draws = field(default_factory=Draws)


@dataclass
class Prefill:
    tokens: Tokens  # in front of the current layer
    original: Tokens
    # Visual tokens of each sample or, per image, of each of its images: in front of the current layer,
    left: list[list[int]]
    given: list[list[int]]  # and in the prompt
    copies: int  # rows of each sample
    next_position: Tensor
    first_number: Tensor | int  # that a column gets where columns are numbered anew
    before: Before
    prompt: Prompt
    seen: list[Any]  # of the vision tower, for the saliency
    deepstack: DeepStack | None
    report: Report
    cache: Any = None  # that the layers fill
    rows: int = 0  # in front of the decoder's norm, the last of them; 0: all
    embedded: Tensor | None = None  # what went into the first layer, for the methods that ask for it
    segments: list[Segment] = field(default_factory=list)
    attention: AttentionInputs | None = None  # of the layer before a pruning layer
    projecting: list[AttentionInputs] | None = None  # while a pruning layer's attention is called for these alone
    columns: list[Tensor] = field(default_factory=list)  # of each segment, into the sequence before it
    # What layers that are alike (`alike`) get instead of the model's, since the last pruning.
    replaced: dict[tuple[str, Model], Inputs] = field(default_factory=dict)


def begin_prefill(
    plan: Plan, call: ModelCall, prompt: Prompt, inputs: Inputs, cache: Any, asked: Asked | None
) -> tuple[Prefill | None, Inputs]:
    """The prefill and the arguments that the decoder gets: without visual tokens, None and the inputs unchanged."""
    mask, (batch, length) = call.attention_mask, prompt.is_visual.shape
    flat = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= length
    tokens = read_prompt(prompt.is_visual, mask[:, -length:].bool() if isinstance(mask, Tensor) and flat else None)
    if not any(tokens.counts):
        return None, inputs
    if asked is not None:
        check_asked(asked)
    check_cache(cache, plan.family, plan.decoder.config, compact=plan.compact_cache)
    if mask is not None and not (flat and mask.shape[1] == layer_length(cache, 0) + length):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(f"prune_visual_tokens: the attention_mask must be [B, L] or absent, got {got}")
    if plan.family.prefix is not None and prompt.inputs.get(plan.family.prefix) is None:
        raise NotImplementedError(
            f"prune_visual_tokens: a prompt of {plan.family.name} needs {plan.family.prefix}, which its processor "
            "returns"
        )
    check_counts(plan.family, plan.decoder.config, tokens.length)
    check_one_sequence(inputs.get("position_ids"), mask)
    check_checkpointing(plan.decoder)
    before = before_prompt(cache, plan.family, mask)
    family = plan.family
    prompt.inputs = {**prompt.inputs, **call.encoding.arguments}
    read = {name: prompt.inputs.get(name) for name in (*family.layout_inputs, *family.watched)}
    layout = functools.cache(lambda: family.layout(plan.core, read, tokens.counts))
    counted = prompt.inputs.get("position_ids") is not None
    report = Report(tokens.counts, layout)
    position = _next_position(inputs, tokens, counted, before)
    deepstack = None
    if family.deepstack:
        deepstack, inputs = take_deepstack(inputs, tokens)
    given = images_of(layout(), tokens.counts) if plan.per_image else [[n] for n in tokens.counts]
    copies = 1 if asked is None else asked.copies
    if given != [parts for parts in given[::copies] for _ in range(copies)]:
        copies = 1  # a forward inside of generate that is none of its own
    now = Prefill(
        tokens, tokens, given, given, copies, position, _first_number(plan, inputs, tokens, before), before, prompt,
        call.encoding.saliency, deepstack, report,
    )  # fmt: skip
    if any(_budgets(planned.budget, now) != now.left for planned in plan.stages.values()):
        now.rows, inputs = all_rows(inputs)
    return now, inputs


def prefill_layer(plan: Plan, now: Prefill, index: int, takes: Arguments, inputs: Inputs) -> Inputs:
    """The arguments that a decoder layer gets."""
    if index == 0:
        takes.given(inputs, "hidden_states", "attention_mask", "position_embeddings", "cache")
        now.cache = takes.cache(inputs)
        check_cache(now.cache, plan.family, plan.decoder.config, compact=plan.compact_cache)  # may be the decoder's own
        if plan.compact_cache and now.cache is not None:
            free_windows(now.cache, range(len(plan.decoder.layers)))
    if now.deepstack is not None:
        inputs = {**inputs, "hidden_states": now.deepstack.added(index - 1, inputs["hidden_states"], now.tokens)}
    if index == 0 and any(planned.stage.uses & {"input_features", "input_text"} for planned in plan.stages.values()):
        now.embedded = _read(plan, inputs["hidden_states"])
    if index in plan.stages:
        inputs = _prune(plan, now, plan.stages[index], inputs)
    return {**inputs, **_of_what_is_left(plan, now, index, inputs)}


def end_prefill(plan: Plan, now: Prefill) -> None:
    """Leaves what decoding and the user will ask for."""
    if not now.segments:
        now.report.untouched(now.original.origin)
        if now.cache is not None:
            take_windows_back(now.cache, filled=True)
        return
    last = now.segments[-1]
    if not layer_length(now.cache, 0):  # none, or gradient checkpointing has kept it from the layers
        return
    if plan.compact_cache and last.first > 0:
        with now.report.clock("compact_ms", now.original.slot.device):
            _compact_caches(now)
        own = [s for s in now.segments if s.next_position is not None or s.bias is not None]
        everywhere = Segment(0, last.tokens, last.columns)
        now.segments = [everywhere, *(replace(s, tokens=last.tokens, columns=last.columns) for s in own)]
    length = now.before.length + now.original.length
    remember(now.cache, Pruned(length, padded(now.original), now.segments, now.next_position, now.before))


def _compact_caches(now: Prefill) -> None:
    """Drops from the cache of every layer what the last layers lack; the layers up to a pruning are one call."""
    left: Tensor | None = None  # the columns of the last segment, in the sequence in front of the current one
    starts = [0, *(segment.first for segment in now.segments)]
    for start, end, columns in reversed(list(zip(starts, starts[1:], now.columns, strict=False))):
        left = columns if left is None else indices_at(columns, left)
        if start < end:
            held = torch.arange(now.before.length, device=left.device).expand(len(left), -1)
            behind = torch.where(left < 0, left, left + now.before.length)
            compact_layers(now.cache, range(start, end), torch.cat([held, behind], 1))


def _prune(plan: Plan, now: Prefill, planned: PlannedStage, inputs: Inputs) -> Inputs:
    tokens = now.tokens
    budgets = _budgets(planned.budget, now)
    if budgets == now.left:
        return inputs
    hidden: Tensor = inputs["hidden_states"]
    if planned.stage.uses & ON_GRID:
        assert now.report.layout is not None
        check_on_grid(now.report.layout(), planned.stage.name)
    with torch.no_grad(), now.report.clock("select_ms", hidden.device):
        with plan.draws.lock if "generator" in planned.stage.uses else nullcontext():
            chosen = choose(planned.stage, _context(plan, now, planned.layer, inputs), now.left, budgets, plan.options)
        after, columns = keep(tokens, chosen.indices, [sum(parts) for parts in budgets])
    now.attention = None
    with now.report.clock("compact_ms", hidden.device):
        held = now.segments[-1].bias if now.segments else None
        name, sizes = planned.stage.name, chosen.sizes
        bias = bias_of(name, now.original, after, sizes, held) if plan.calibrate else None
        next_position = (after.numbered() + now.first_number)[:, -1] + 1 if plan.renumber else None
        if next_position is not None and planned.layer == 0:  # the model counts on from there in all of its layers
            now.next_position, next_position = next_position, None
        now.columns.append(columns)
        now.segments.append(Segment(planned.layer, after, composed(now.columns), next_position, bias))
        now.replaced = {}
        at = hidden.dim() - 3  # [B, L, C], or stacks of them
        (hidden,) = gather_compact([hidden], columns, dims=[at + 1], batch_dims=[at])
        if chosen.merged is not None:
            hidden = with_rows(name, hidden, after.visual, chosen.merged)
        if now.cache is not None:
            free_windows(now.cache, range(planned.layer, len(plan.decoder.layers)))
    now.tokens, now.left = after, budgets
    now.report.pruned(planned.layer, after.counts, after.origin, served_by("gather_compact", hidden), chosen.told)
    return {**inputs, "hidden_states": hidden}


def _budgets(budget: Budget, now: Prefill) -> list[list[int]]:
    """How many stay of what is left, of each sample or of each of its images. generate's copies of a sample are one."""
    once = now.given[:: now.copies]
    others = [n - c for n, c in zip(now.original.lengths, now.original.counts, strict=True)][:: now.copies]
    further = [n for n, parts in zip(others, once, strict=True) for _ in parts]
    due = iter(budget([n for parts in once for n in parts], further))
    kept = [[next(due) for _ in parts] for parts in once]
    repeated = [parts for parts in kept for _ in range(now.copies)]
    return [[min(pair) for pair in zip(*pairs, strict=True)] for pairs in zip(repeated, now.left, strict=True)]


def _read(plan: Plan, hidden: Tensor) -> Tensor:
    """[B, L, C]: the hidden states that methods read; all of them, but for a decoder with several of each token."""
    name = plan.family.stack
    return (hidden if name is None else hidden[getattr(plan.decoder.config, name)]).detach()


def _context(plan: Plan, now: Prefill, index: int, inputs: Inputs) -> LayerContext:
    layer = plan.decoder.layers[index]
    hidden = _read(plan, inputs["hidden_states"])

    @functools.cache
    def projected() -> AttentionInputs:
        # The attention is called as the layer does, whatever norms, rotations and offloaded weights are in it, without
        # a cache; `Block.projecting` takes what it would attend with, and it attends to nothing.
        embeddings = {**inputs, **_of_what_is_left(plan, now, index, inputs)}["position_embeddings"]
        found: list[AttentionInputs] = []
        shared: Inputs = {"shared_kv_states": {}} if "shared_kv_states" in inputs else {}
        now.projecting = found
        try:
            layer.self_attn(
                hidden_states=plan.family.normed(layer, inputs["hidden_states"].detach()), attention_mask=None,
                position_embeddings=embeddings, **shared,
            )  # fmt: skip
        finally:
            now.projecting = None
        if not found:
            raise not_seen()
        made, held = found[0], now.before.length
        if not held:
            return made
        cached = now.cache.layers[index].keys[:, :, :held].to(made.key.device)
        return replace(made, key=torch.cat([cached, made.key], 2))

    @functools.cache
    def layout() -> Layout:
        assert now.report.layout is not None
        return Layout(*(t.to(hidden.device, non_blocking=True) for t in vars(now.report.layout()).values()))

    def saliency() -> Tensor:
        assert plan.saliency is not None
        if not now.seen:
            raise RuntimeError(f"prune_visual_tokens: {plan.method} needs the vision tower to run inside the block")
        return plan.saliency.read(plan.core, now.prompt.inputs, now.original.counts, now.seen).to(hidden.device)

    @functools.cache
    def embedded() -> Embedded:
        assert now.embedded is not None
        return Embedded(now.embedded.to(hidden.device), now.original, columns_left(now).to(hidden.device))

    def generator() -> torch.Generator | None:
        drawn = plan.draws.of(plan.seed, hidden.device)
        return same_generator(layer, hidden.device) if drawn is None else drawn

    seen, keys = now.attention, now.before.length + now.tokens.length
    if seen is not None and kind_of(plan.decoder.config, index - 1) != FULL:
        seen = replace(seen, lse=None)  # it is that of a window, and methods see all keys
    if seen is not None and seen.key.shape[2] > keys:  # with the free places of a static cache
        seen = replace(seen, key=seen.key[:, :, :keys])
    causal = plan.family.prefix is None
    return LayerContext(
        now.tokens, hidden, layer, seen, projected, embedded, layout, saliency, generator, causal, before=now.before
    )


def columns_left(now: Prefill) -> Tensor:
    """[B, L]: which column of the prompt each of those that are left was, -1 for padding."""
    device = now.original.slot.device
    column = torch.arange(now.original.length, device=device).expand(len(now.original.counts), -1)
    return composed([column, *now.columns])


def _of_what_is_left(plan: Plan, now: Prefill, index: int, inputs: Inputs) -> Inputs:
    """What a layer gets besides its hidden states, of the tokens that are left; most of it is that of all alike."""
    if not now.segments:
        return {}
    segment = now.segments[-1]
    own = {name: inputs[name] for name in plan.family.layer_inputs if inputs.get(name) is not None}
    rows = gather_compact(list(own.values()), segment.columns, dims=[1] * len(own)) if own else []
    kind = alike(plan.family, plan.decoder, index)
    if kind not in now.replaced:
        with now.report.clock("compact_ms", inputs["hidden_states"].device):
            now.replaced[kind] = shortened(
                plan.family, plan.decoder, index, segment, inputs, before=now.before, cache=now.cache,
                number=segment.tokens.numbered() + now.first_number if plan.renumber else None,
            )  # fmt: skip
    return now.replaced[kind] | dict(zip(own, rows, strict=True))


def _next_position(inputs: Inputs, tokens: Tokens, counted: bool, before: Before) -> Tensor:
    """The position behind the prompt, as the model counts on.

    generate counts positions itself (`counted`), on from the last column. Else the model adds its rope_deltas, behind
    the largest position, which may be an image's. Of several rows, the first of four counts text; the others share it.
    """
    positions = inputs.get("position_ids")
    batch = tokens.slot.shape[0]
    if positions is None:
        return torch.full((batch,), before.length + tokens.length, device=tokens.slot.device)
    if counted:
        last: Tensor = positions[..., -1] + 1
        return last.expand(*last.shape[:-1], batch)
    highest: Tensor = positions.amax(-1) + 1
    if highest.dim() == 1:
        return highest.expand(batch)
    axes = highest[-3:].amax(0, keepdim=True).expand(3, -1)
    return (torch.cat([highest[:-3], axes]) if len(highest) > 3 else axes).expand(-1, batch)


def _first_number(plan: Plan, inputs: Inputs, tokens: Tokens, before: Before) -> Tensor | int:
    """The number that the first column gets where columns are numbered anew: behind what is cached, the model's own."""
    positions = inputs.get("position_ids")
    if not plan.renumber or not before.length or positions is None:
        return before.length
    first = tokens.slot.new_zeros(len(tokens.counts)) if tokens.real is None else tokens.real.int().argmax(1)
    number: Tensor = positions.expand(len(tokens.counts), -1).gather(1, first.unsqueeze(1))
    return number
