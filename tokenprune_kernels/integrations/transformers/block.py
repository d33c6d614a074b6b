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
from .cache import layer_length, pruned_of
from .calls import Calls
from .choose import AttentionInputs
from .decode import Decode, begin_decode, decode_layer
from .encoding import Prompt
from .families import Inputs, Model
from .interface import Arguments
from .prefill import IMAGES_LATER, Draws, Plan, Prefill, begin_prefill, columns_left, end_prefill, prefill_layer
from .report import Report
from .training import begin_head, check_head


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

    def before_head(self, head: Model, inputs: Inputs) -> Inputs:
        call, inputs = begin_head(inputs)
        self.calls.heads.append(call)
        ids = inputs.get("input_ids")
        asked = inputs.get("labels") is not None or isinstance(inputs.get("logits_to_keep"), Tensor)
        if asked and (ids is None or bool(self._is_visual(ids).any())):
            check_head(head, inputs)
        return inputs

    def after_head(self, ended: bool) -> None:
        if self.calls.heads:
            self.calls.heads.pop()

    def _is_visual(self, ids: Tensor) -> Tensor:
        visual = self.plan.family.visual_ids(self.plan.core.config)
        return torch.stack([ids == token for token in visual]).any(0)

    def _ids_of(self, embeds: Tensor) -> Tensor | None:
        """[B, L]: the ids that generate has beside embeddings, or -1 at all but placeholders, which the model finds in
        the same way; None when there are none."""
        asked = self.calls.asked[-1].prompt if self.calls.asked else None
        if asked is not None and asked.shape == embeds.shape[:2]:
            return asked
        core = self.plan.core
        tokens = torch.tensor(self.plan.family.visual_ids(core.config), device=embeds.device)
        placeholders = core.get_input_embeddings()(tokens).to(embeds)
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        for token, placeholder in zip(tokens, placeholders, strict=True):
            ids = torch.where((embeds == placeholder).all(-1), token, ids)
        return ids if bool((ids >= 0).any()) else None

    def before_core(self, takes: Arguments, inputs: Inputs) -> None:
        call = self.calls.begin_model()
        self.follow()
        features = sorted((inputs.get("mm_encoder_outputs") or {}).items())  # the tower runs over images first
        for encoding in self.calls.encoded_as([encoded for _, encoded in features]):
            call.encoding.add(encoding)
        call.attention_mask = inputs.get("attention_mask")
        ids, embeds, cache = inputs.get("input_ids"), inputs.get("inputs_embeds"), takes.cache(inputs)
        if ids is None and embeds is not None and embeds.shape[1] > 1:
            ids = self._ids_of(embeds)
            if ids is None and not layer_length(cache, 0):
                raise NotImplementedError(
                    "prune_visual_tokens: inputs_embeds whose images are in place already tell no visual tokens; give "
                    "generate the input_ids too, or embeddings of the placeholders and the images"
                )
        if ids is not None and ids.shape[1] > 1:
            call.prompt = Prompt({**inputs, "input_ids": ids}, self._is_visual(ids))

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
        if call is not None and calls.encoding is not call.encoding:
            call = None  # while images are encoded: of another model, which shares this decoder
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
            if self.calls.heads and now.segments:
                self.calls.heads[-1].pruned(columns_left(now), now.original.length)
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
