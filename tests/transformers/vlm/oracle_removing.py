"""The slow, independent path of models with linear attention: dropped tokens are taken out of what a layer is given.

A mask hides a token from an attention, but a recurrent state has seen it all the same. Each sample runs by itself in
float64, without padding and without a cache, and linear attention is its recurrence, one token after the other.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu, softplus
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .models import Prompts
from .oracle import Drop, extended, in_float64

NAME = "float64_removing"


def gated_delta_net(module: Any, hidden_states: Tensor, **_: Any) -> Tensor:
    """Gated DeltaNet (arXiv 2412.06464, equation 10) of [1, L, C], behind a causal convolution and silu.

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}' k_t)', o_t = S_t' q_t, with k and q of length 1, and q over sqrt(D).
    """
    mixed = module.in_proj_qkv(hidden_states).mT
    width = module.conv1d.weight.shape[-1]
    mixed = conv1d(pad(mixed, (width - 1, 0)), module.conv1d.weight, module.conv1d.bias, groups=mixed.shape[1])
    parts = silu(mixed).mT[0].split([module.key_dim, module.key_dim, module.value_dim], -1)
    query, key, value = (t.unflatten(-1, (-1, size)) for t, size in zip(
        parts, (module.head_k_dim, module.head_k_dim, module.head_v_dim), strict=True
    ))  # fmt: skip
    heads = value.shape[1]
    query, key = (t.repeat_interleave(heads // t.shape[1], 1) for t in (query, key))
    query, key = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (query, key))
    query = query * query.shape[-1] ** -0.5
    rate = module.in_proj_b(hidden_states)[0].sigmoid()
    stays = (-module.A_log.exp() * softplus(module.in_proj_a(hidden_states)[0] + module.dt_bias)).exp()
    state = hidden_states.new_zeros(heads, key.shape[-1], value.shape[-1])
    rows = []
    for t in range(len(value)):
        state = stays[t].view(-1, 1, 1) * state
        correction = rate[t].unsqueeze(-1) * (value[t] - torch.einsum("hkv,hk->hv", state, key[t]))
        state = state + torch.einsum("hk,hv->hkv", key[t], correction)
        rows.append(torch.einsum("hkv,hk->hv", state, query[t]))
    out = torch.stack(rows)
    gate = module.in_proj_z(hidden_states)[0].unflatten(-1, (heads, -1))
    out = out * (out.square().mean(-1, keepdim=True) + module.norm.variance_epsilon).rsqrt()
    result: Tensor = module.out_proj((module.norm.weight * out * silu(gate)).flatten(1)).unsqueeze(0)
    return result


class _ReachedError(Exception):
    pass


def _given_to_decoder(exact: Prompts, inputs: Any, more: Any) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, C] and positions [3, B, L] of the whole sequence."""
    found: dict[str, Any] = {}

    def take(module: Any, args: Any, kwargs: Any) -> None:
        found.update(kwargs)
        raise _ReachedError

    handle = exact.model.model.language_model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        exact.model(**inputs, use_cache=False, **more)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found["inputs_embeds"], found["position_ids"][-3:]


def logits(prompts: Prompts, drops: Sequence[Drop], new: Tensor | None = None, **more: Any) -> Tensor:
    """As `oracle.logits`: [B, L + new, vocabulary] in float64, 0 where a column is dropped or padding."""
    exact = in_float64(prompts)
    inputs, length = extended(exact, new), exact.inputs["input_ids"].shape[1]
    decoder = exact.model.model.language_model
    here: dict[str, Any] = {}

    def attend(m: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        columns = here["columns"]
        allowed = columns <= columns.unsqueeze(1)
        # New rows miss what a compacted cache has lost, in front of the layer that dropped it too.
        allowed = allowed & ~(here["lost"][columns] & (columns >= length).unsqueeze(1))
        weights = (query @ key.mT * scaling).masked_fill(~allowed, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    decoder.config._attn_implementation = NAME
    for layer in decoder.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.forward = functools.partial(gated_delta_net, layer.linear_attn)
    with torch.no_grad():
        embeddings, positions = _given_to_decoder(exact, inputs, more)
        rows = []
        for b, real in enumerate(inputs["attention_mask"].bool()):
            gone = [pad(drop.columns[b], (0, len(real) - length)) for drop in drops]
            lost = [g for g, drop in zip(gone, drops, strict=True) if drop.everywhere_for_new_rows]
            here["lost"] = torch.stack([torch.zeros_like(real), *lost]).any(0)
            columns = real.nonzero().squeeze(1)
            hidden = embeddings[b : b + 1, columns]
            for index, layer in enumerate(decoder.layers):
                for g, drop in zip(gone, drops, strict=True):
                    if drop.layer == index:
                        stays = ~g[columns]
                        columns, hidden = columns[stays], hidden[:, stays]
                here["columns"] = columns
                rotary = decoder.rotary_emb(hidden, positions[:, b : b + 1, columns])
                hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
            last = exact.model.lm_head(decoder.norm(hidden))
            rows.append(last.new_zeros(len(real), last.shape[-1]).index_copy(0, columns, last[0]))
    return torch.stack(rows)
