"""The slow, independent path: the whole model in float64, nothing removed, dropped tokens masked out of the attention.

No cache: every step of decoding runs the whole sequence again. From its layer on, a dropped token is seen by no row.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .models import Prompts
from .routing import clear_routing

NAME = "float64_oracle"


@dataclass
class Drop:
    """From decoder layer `layer` on, the columns with `columns` [B, L] True are gone.

    everywhere_for_new_rows: rows behind the prompt miss them in the layers before too (a compacted cache).
    bias [B, L]: what is added to the logits of the keys from that layer on.
    """

    layer: int
    columns: Tensor
    everywhere_for_new_rows: bool = False
    bias: Tensor | None = None


def _attention(drops: Sequence[Drop], prompt_length: int) -> Any:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        rows, columns = query.shape[2], key.shape[2]
        column = torch.arange(columns)
        allowed = (column <= column[:rows].unsqueeze(1) + columns - rows).expand(query.shape[0], 1, -1, -1)
        if mask is not None:  # the model's own: padding, windows, images that see all of themselves
            allowed = (mask if mask.dtype == torch.bool else mask > -1).expand(query.shape[0], 1, -1, -1)
        for drop in drops:
            gone = torch.nn.functional.pad(drop.columns, (0, columns - drop.columns.shape[1]))[:, None, None, :]
            if module.layer_idx < drop.layer:
                if not drop.everywhere_for_new_rows:
                    continue
                gone = gone & (column >= prompt_length).view(1, 1, -1, 1)
            allowed = allowed & ~gone
        logits = query @ key.mT * scaling
        if kwargs.get("softcap") is not None:
            logits = (logits / kwargs["softcap"]).tanh() * kwargs["softcap"]
        for drop in drops:
            if drop.bias is not None and module.layer_idx >= drop.layer:
                logits = logits + torch.nn.functional.pad(drop.bias, (0, columns - drop.bias.shape[1]))[:, None, None]
        logits = logits.masked_fill(~allowed, -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0)  # padding and dropped rows may see nothing
        return (weights @ value).transpose(1, 2).contiguous(), None

    return attend


@contextmanager
def _masking(decoder: Any, drops: Sequence[Drop], prompt_length: int) -> Iterator[None]:
    before = decoder.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention(drops, prompt_length))
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    decoder.config._attn_implementation = NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


@contextmanager
def _renumbering(decoder: Any, drops: Sequence[Drop], real: Tensor) -> Iterator[None]:
    """Layers behind a drop rotate by positions that count the real [B, L] columns that are left there."""
    handles = []
    by_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    stays = real
    for index, layer in enumerate(decoder.layers):
        for drop in drops:
            if drop.layer == index:
                stays = stays & ~torch.nn.functional.pad(drop.columns, (0, real.shape[1] - drop.columns.shape[1]))
        if not any(drop.layer <= index for drop in drops):
            continue

        def rotated(module: Any, args: Any, kwargs: Any, stays: Tensor = stays, index: int = index) -> Any:
            given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
            number = (stays.cumsum(1) - 1).clamp_min(0)
            kind = {"layer_type": module.self_attn.layer_type} if by_kind else {}
            rotary = rotary_of(decoder, index)
            return (), {**given, "position_embeddings": rotary(given["hidden_states"], position_ids=number, **kind)}

        handles.append(layer.register_forward_pre_hook(rotated, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoder_of(model: Any) -> Any:
    core = getattr(model, "model", model)
    decoder = core.language_model if hasattr(core, "language_model") else core.text_model  # Idefics3, SmolVLM
    return getattr(decoder, "model", decoder)  # Llama 4 has its head there


def rotary_of(decoder: Any, layer: int) -> Any:
    """Molmo 2 with OLMo rotates some layers by other frequencies."""
    unscaled = getattr(decoder, "rope_types", {layer: None})[layer] == "unscaled"
    return decoder.rotary_emb_unscaled if unscaled else decoder.rotary_emb


def in_float64(prompts: Prompts) -> Prompts:
    model = copy.deepcopy(prompts.model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # products of groups, the default, have no float64
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in prompts.inputs.items()}
    return replace(prompts, model=model, inputs=inputs)


def dropped_columns(prompts: Prompts, kept: Tensor) -> Tensor:
    """[B, L]: the columns of visual tokens that are not among `kept` [B, K]."""
    is_visual = torch.isin(prompts.inputs["input_ids"], torch.tensor(prompts.visual))
    slot = is_visual.cumsum(1) - 1
    gone = torch.zeros_like(is_visual)
    for b, row in enumerate(kept.tolist()):
        stays = torch.isin(slot[b], torch.tensor([r for r in row if r >= 0]))
        gone[b] = is_visual[b] & ~stays
    return gone


def extended(exact: Prompts, new: Tensor | None) -> dict[str, Tensor]:
    """The arguments of a forward over the prompt and the tokens behind it."""
    inputs = dict(exact.inputs)
    if new is not None:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
        for name, kind in (("mm_token_type_ids", 0), ("token_type_ids", exact.new_type)):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, new.shape[1]), value=kind)
    return inputs


def logits(
    prompts: Prompts,
    drops: Sequence[Drop],
    new: Tensor | None = None,
    *,
    renumber: bool = False,
    exact: Prompts | None = None,
    **more: Any,
) -> Tensor:
    """[B, L + new, vocabulary] in float64 of the prompt and of tokens decoded after it, every step from scratch.

    renumber: in the layers behind a drop, positions count what is left there. exact: the prompts `in_float64`, for who
    asks several times.
    """
    exact = exact or in_float64(prompts)
    inputs, length = extended(exact, new), exact.inputs["input_ids"].shape[1]
    decoder, real = decoder_of(exact.model), inputs["attention_mask"].bool()
    numbering = _renumbering(decoder, drops, real) if renumber else nullcontext()
    with torch.no_grad(), clear_routing(), numbering, _masking(decoder, drops, length):
        result: Tensor = exact.model(**inputs, use_cache=False, **more).logits
    return result


def greedy(prompts: Prompts, drops: Sequence[Drop], steps: int, **more: Any) -> Tensor:
    """[B, steps]: greedy decoding."""
    new = torch.zeros((prompts.inputs["input_ids"].shape[0], 0), dtype=torch.int64)
    for _ in range(steps):
        last = logits(prompts, drops, new, **more)[:, -1]
        last[:, torch.tensor(prompts.visual)] = -torch.inf  # as `suppress_tokens` of generate
        best = last.argmax(-1, keepdim=True)
        new = torch.cat([new, best], 1)
    return new
