"""What a block puts into a model: hooks that watch the calls, and take them to the prefill or the decoding they are.

Whatever changes from one call to the next is in `Calls`, of each thread its own: a block serves several threads, and a
forward may run inside another.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import ShownAttention
from .cache import pruned_of
from .calls import Calls, ModelCall, Prompt
from .choose import AttentionInputs
from .copies import leave_out_of_copies, ours
from .decode import Decode, begin_decode, decode_layer
from .families import Family, Inputs, unwrapped
from .interface import Arguments, arguments_of
from .masks import check_full_attention
from .prefill import PICTURE_LATER, Draws, Plan, PlannedStage, Prefill, begin_prefill, end_prefill, prefill_layer
from .report import Report
from .watch import watches_of

# (the arguments by name) -> those that forward gets instead, or None
Hook = Callable[[Inputs], Inputs | None]


class Hooks:
    def __init__(
        self, model: nn.Module, family: Family, core: nn.Module, decoder: nn.Module, method: str,
        stages: list[PlannedStage], *, renumber: bool, compact_cache: bool, seed: int | None, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.report = Report()  # of the prefill that was finished last
        # Each may be what is called: a PEFT model skips the hooks of the model that it wraps, generate those of PEFT.
        self._heads = [head for head in dict.fromkeys((model, unwrapped(model))) if head is not core]
        self._model, self._core = unwrapped(model), core
        self._decoder: Any = decoder  # a module whose attributes depend on the family
        self._plan = Plan(
            family, core, decoder, method, {planned.layer: planned for planned in stages},
            renumber=renumber, compact_cache=compact_cache, seed=seed, options=options,
        )  # fmt: skip
        self._calls = Calls()
        self._reporting = threading.Lock()
        self._attention: list[ShownAttention] = []
        self._undo: list[Callable[[], None]] = []  # the last one first
        self._touched: set[type] = set()  # the classes of what hooks and attributes are put into

    # --- entering and leaving --------------------------------------------------------------------------------------

    def install(self) -> None:
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        plan, layers = self._plan, self._decoder.layers
        check_full_attention(self._decoder.config)
        takes = arguments_of(layers[0], "hidden_states", "attention_mask", "position_embeddings", "cache")
        of_decoder = arguments_of(self._decoder, "inputs_embeds", "attention_mask", "position_ids", "cache")
        of_core = arguments_of(self._core, "input_ids", "attention_mask", "position_ids", "cache")
        probed = {planned.layer - 1 for planned in plan.stages.values() if planned.stage.reads_attention}
        see = _uncompiled(self._see)
        self._show(ShownAttention(self._decoder.config, {layers[index].self_attn: see for index in probed}))
        if any("saliency" in planned.stage.uses for planned in plan.stages.values()):
            assert plan.family.saliency is not None
            try:
                saliency = plan.family.saliency(self._core)
            except NotImplementedError as lacking:
                raise NotImplementedError(f"prune_visual_tokens: {plan.method} needs {lacking}") from None
            saliency.written_down = self._seen_of_pictures
            self._plan = plan = replace(plan, saliency=saliency)
            probe = _uncompiled(self._see_tower)
            self._show(ShownAttention(saliency.config, {saliency.attention: probe}, shared=True))
        for watch in watches_of(self._model, self._core, self._calls, plan.family.watched, self._follow):
            self._undo.append(watch.remove)
            watch.install()
        for head in self._heads:
            self._before(head, arguments_of(head), self._before_head)
        self._before(self._core, of_core, partial(self._before_core, of_core))
        self._after(self._core, self._after_core)
        self._before(self._decoder, of_decoder, partial(self._before_decoder, of_decoder))
        self._after(self._decoder, self._after_decoder)
        for index, layer in enumerate(layers):  # all of them: a cache may have been pruned by another method
            self._before(layer, takes, partial(self._before_layer, index, takes))
        if "deepstack_visual_embeds" in of_decoder.names:
            of_norm = arguments_of(self._decoder.norm)
            self._before(self._decoder.norm, of_norm, partial(self._before_norm, of_norm))
        self._undo.append(leave_out_of_copies(self._touched | {type(shown.config) for shown in self._attention}))

    def _show(self, attention: ShownAttention) -> None:
        self._attention.append(attention)
        self._undo.append(attention.remove)
        attention.install()

    def _before(self, module: nn.Module, takes: Arguments, hook: Hook) -> None:
        def run(m: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> Any:
            inputs = hook(takes.bind(args, kwargs))
            return None if inputs is None else takes.split(inputs, len(args))

        self._touched.add(type(module))
        self._undo.append(module.register_forward_pre_hook(_uncompiled(run), with_kwargs=True).remove)

    def _after(self, module: nn.Module, hook: Callable[[bool], None]) -> None:
        """Runs after an exception too: hook(whether forward came to its end)."""

        def run(m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hook(output is not None)

        self._undo.append(module.register_forward_hook(_uncompiled(run), always_call=True).remove)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._attention.clear()
        self._calls = Calls()
        self._plan = replace(self._plan, saliency=None, draws=Draws())

    # --- the prompt ------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        for attention in self._attention:
            attention.follow()

    def _before_head(self, inputs: Inputs) -> None:
        unfit = [n for n in ("labels", "logits_to_keep") if isinstance(inputs.get(n), Tensor)]
        ids = inputs.get("input_ids")
        if unfit and ids is not None and bool(self._is_visual(ids).any()):
            raise ValueError(
                f"prune_visual_tokens: {unfit[0]} belongs to columns that pruned logits lack; compute the loss "
                "outside, or index the logits from the right end"
            )

    def _is_visual(self, ids: Tensor) -> Tensor:
        visual = self._plan.family.visual_ids(self._core.config)
        is_visual = ids == visual[0]
        for other in visual[1:]:
            is_visual = is_visual | (ids == other)
        return is_visual

    def _before_core(self, takes: Arguments, inputs: Inputs) -> None:
        call = ModelCall(None)
        self._calls.models.append(call)
        self._follow()
        features = sorted((inputs.get("mm_encoder_outputs") or {}).items())  # the tower runs over images first
        for pictures in self._calls.encoded_as([encoded for _, encoded in features]):
            call.pictures.add(pictures)
        ids, cache = inputs.get("input_ids"), takes.cache(inputs)
        if ids is not None:
            if ids.shape[1] > 1:
                call.prompt = Prompt(inputs, self._is_visual(ids))
            return
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and embeds.shape[1] > 1 and (cache is None or not cache.get_seq_length()):
            raise NotImplementedError("prune_visual_tokens: needs input_ids to find the visual tokens")

    def _after_core(self, ended: bool) -> None:
        if not self._calls.models:  # another hook raised in front of ours
            return
        call = self._calls.models.pop()
        if ended and call.prompt is not None and bool(call.prompt.is_visual.any()):
            raise RuntimeError(
                f"prune_visual_tokens: {type(self._core).__name__} did not call its {type(self._decoder).__name__}; "
                "this version of transformers is not supported"
            )

    # --- the decoder -----------------------------------------------------------------------------------------------

    def _before_decoder(self, takes: Arguments, inputs: Inputs) -> Inputs | None:
        calls = self._calls
        calls.decoders.append(None)
        call = calls.models[-1] if calls.models else None
        prompt = None
        if call is not None:
            prompt, call.prompt = call.prompt, None
        cache = takes.cache(inputs)
        pruned = pruned_of(cache)
        if pruned is not None:
            if prompt is not None and bool(prompt.is_visual.any()):
                raise NotImplementedError(PICTURE_LATER)
            calls.decoders[-1], inputs = begin_decode(pruned, inputs, cache)
            return inputs
        if call is None or prompt is None:
            return None
        takes.given(inputs, "inputs_embeds", "attention_mask", "position_ids", "cache")
        asked = calls.asked[-1] if calls.asked else None
        calls.decoders[-1], inputs = begin_prefill(self._plan, call, prompt, inputs, cache, asked)
        return inputs

    def _after_decoder(self, ended: bool) -> None:
        now = self._calls.decoders.pop() if self._calls.decoders else None
        if ended and isinstance(now, Prefill):
            end_prefill(self._plan, now)
            with self._reporting:
                now.report.prefills = self.report.prefills + 1
                self.report = now.report

    # --- the layers ------------------------------------------------------------------------------------------------

    def _see(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]) -> None:
        now = self._calls.decoder
        if isinstance(now, Prefill):
            now.attention = AttentionInputs(query, key, scale, lse)

    def _see_tower(
        self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]
    ) -> None:
        """Not when the tower runs for another model that shares it."""
        if self._calls.pictures is not None and self._plan.saliency is not None:
            self._plan.saliency.see(query, key, scale, lse, keywords)

    def _seen_of_pictures(self) -> list[Any]:
        pictures = self._calls.pictures
        return [] if pictures is None else pictures.saliency

    def _before_layer(self, index: int, takes: Arguments, inputs: Inputs) -> Inputs | None:
        now = self._calls.decoder
        if isinstance(now, Decode):
            return decode_layer(self._decoder.config, now, index, takes, inputs)
        if isinstance(now, Prefill):
            return prefill_layer(self._plan, now, index, self._decoder.layers[index], takes, inputs)
        return None

    def _before_norm(self, takes: Arguments, inputs: Inputs) -> Inputs | None:
        """Behind the last layer."""
        now = self._calls.decoder
        if not isinstance(now, Prefill) or now.deepstack is None:
            return None
        name, last = takes.names[0], len(self._decoder.layers) - 1
        return {**inputs, name: now.deepstack.added(last, inputs[name], now.tokens)}


def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile leaves hooks to Python: what they remember must not become part of a graph."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    return ours(torch.compiler.disable(run))
