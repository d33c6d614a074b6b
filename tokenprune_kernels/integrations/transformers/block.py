"""What a block does at each call of the model, its decoder and its layers.

It finds the prefill or the decoding that the call is part of, and hands the call to prefill.py or decode.py.

Whatever changes from one call to the next is in `Calls`, of each thread its own: a block serves several threads, and a
forward may run inside another.
"""

import threading
from dataclasses import replace

import torch
from torch import Tensor

from .attention import Heads, ProbedAttention
from .cache import pruned_of
from .calls import Calls
from .choose import AttentionInputs
from .decode import Decode, begin_decode, decode_layer
from .encoding import Prompt
from .families import Inputs
from .interface import Arguments
from .prefill import IMAGES_LATER, Draws, Plan, Prefill, begin_prefill, end_prefill, prefill_layer
from .report import Report


class Block:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.report = Report()  # of the prefill that was finished last
        self.calls = Calls()
        self.attention: list[ProbedAttention] = []
        self._reporting = threading.Lock()

    def forget(self) -> None:
        """Forgets all but the report."""
        self.plan = replace(self.plan, draws=Draws())
        self.calls = Calls()
        self.attention = []

    def follow(self) -> None:
        for attention in self.attention:
            attention.follow()

    # --- the prompt ------------------------------------------------------------------------------------------------

    def before_head(self, inputs: Inputs) -> None:
        unfit = [n for n in ("labels", "logits_to_keep") if isinstance(inputs.get(n), Tensor)]
        ids = inputs.get("input_ids")
        if unfit and ids is not None and bool(self._is_visual(ids).any()):
            raise ValueError(
                f"prune_visual_tokens: {unfit[0]} belongs to columns that pruned logits lack; compute the loss "
                "outside, or index the logits from the right end"
            )

    def _is_visual(self, ids: Tensor) -> Tensor:
        visual = self.plan.family.visual_ids(self.plan.core.config)
        return torch.stack([ids == token for token in visual]).any(0)

    def before_core(self, takes: Arguments, inputs: Inputs) -> None:
        call = self.calls.begin_model()
        self.follow()
        features = sorted((inputs.get("mm_encoder_outputs") or {}).items())  # the tower runs over images first
        for encoding in self.calls.encoded_as([encoded for _, encoded in features]):
            call.encoding.add(encoding)
        call.attention_mask = inputs.get("attention_mask")
        ids, cache = inputs.get("input_ids"), takes.cache(inputs)
        if ids is not None:
            if ids.shape[1] > 1:
                call.prompt = Prompt(inputs, self._is_visual(ids))
            return
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and embeds.shape[1] > 1 and (cache is None or not cache.get_seq_length()):
            raise NotImplementedError("prune_visual_tokens: needs input_ids to find the visual tokens")

    def after_core(self, ended: bool) -> None:
        call = self.calls.end_model()
        if ended and call is not None and call.prompt is not None and bool(call.prompt.is_visual.any()):
            core, decoder = self.plan.core, self.plan.decoder
            raise RuntimeError(
                f"prune_visual_tokens: {type(core).__name__} did not call its {type(decoder).__name__}; "
                "this version of transformers is not supported"
            )

    # --- the decoder -----------------------------------------------------------------------------------------------

    def before_decoder(self, takes: Arguments, inputs: Inputs) -> Inputs | None:
        calls = self.calls
        calls.decoders.append(None)
        call = calls.models[-1] if calls.models else None
        prompt = None
        if call is not None:
            prompt, call.prompt = call.prompt, None
        cache = takes.cache(inputs)
        pruned = pruned_of(cache)
        if pruned is not None:
            if prompt is not None and bool(prompt.is_visual.any()):
                raise NotImplementedError(IMAGES_LATER)
            mask = inputs.get("attention_mask") if call is None else call.attention_mask
            calls.decoders[-1], inputs = begin_decode(pruned, inputs, cache, mask)
            return inputs
        if call is None or prompt is None:
            return None
        takes.given(inputs, "inputs_embeds", "attention_mask", "position_ids", "cache")
        asked = calls.asked[-1] if calls.asked else None
        calls.decoders[-1], inputs = begin_prefill(self.plan, call, prompt, inputs, cache, asked)
        return inputs

    def after_decoder(self, ended: bool) -> None:
        now = self.calls.decoders.pop() if self.calls.decoders else None
        if ended and isinstance(now, Prefill):
            end_prefill(self.plan, now)
            with self._reporting:
                now.report.prefills = self.report.prefills + 1
                self.report = now.report

    # --- the layers ------------------------------------------------------------------------------------------------

    def see(self, heads: Heads, scale: float, keywords: Inputs) -> None:
        """The probe of the attention before a pruning layer."""
        now = self.calls.decoder
        if isinstance(now, Prefill):
            now.attention = AttentionInputs(*heads(), scale)

    def projecting(self, heads: Heads, scale: float) -> bool:
        """Whether a pruning layer's attention is called for these alone, in advance."""
        now = self.calls.decoder
        if not isinstance(now, Prefill) or now.projecting is None:
            return False
        now.projecting.append(AttentionInputs(*heads(), scale))
        return True

    def see_tower(self, heads: Heads, scale: float, keywords: Inputs) -> None:
        """The probe of the vision tower. It sees nothing when the tower runs for another model that shares it."""
        encoding, saliency = self.calls.encoding, self.plan.saliency
        if encoding is not None and saliency is not None:
            query, key, _ = heads()
            encoding.saliency.append(saliency.see(self.plan.core, query, key, scale, keywords))

    def before_layer(self, index: int, takes: Arguments, inputs: Inputs) -> Inputs | None:
        now, plan = self.calls.decoder, self.plan
        if isinstance(now, Decode):
            return decode_layer(plan.family, plan.decoder, now, index, takes, inputs)
        if isinstance(now, Prefill):
            return prefill_layer(plan, now, index, takes, inputs)
        return None

    def before_norm(self, takes: Arguments, inputs: Inputs) -> Inputs | None:
        """Adds the features of the last layer, which no layer comes behind, and drops the rows nobody asked for."""
        now = self.calls.decoder
        if now is None:
            return None
        name, last = takes.names[0], len(self.plan.decoder.layers) - 1
        hidden = inputs[name]
        if isinstance(now, Prefill) and now.deepstack is not None:
            hidden = now.deepstack.added(last, hidden, now.tokens)
        return {**inputs, name: hidden[:, -now.rows :]}
