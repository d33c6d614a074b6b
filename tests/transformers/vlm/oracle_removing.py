"""The slow, independent path of models with linear attention or convolutions: dropped tokens are taken out of what a
layer is given.

A mask hides a token from an attention, but a state has seen it all the same. Each sample runs by itself in float64,
without padding and without a cache, and linear attention is its recurrence, one token after the other.
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
from .routing import clear_routing

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


def short_convolution(module: Any, hidden_states: Tensor, **_: Any) -> Tensor:
    """LFM2's: y_t = W_out (c_t * sum over i of w_i b_{t-i} * x_{t-i}), of three projections b, c and x of [1, L, C]."""
    b, c, x = module.in_proj(hidden_states).mT.chunk(3, 1)
    width = module.conv.weight.shape[-1]
    mixed = conv1d(pad(b * x, (width - 1, 0)), module.conv.weight, module.conv.bias, groups=b.shape[1])
    result: Tensor = module.out_proj((c * mixed).mT)
    return result


class _ReachedError(Exception):
    pass


def _given_to_decoder(exact: Prompts, inputs: Any, more: Any) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, C] and positions [1 or 3, B, L] of the whole sequence."""
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
    embeddings, positions = found["inputs_embeds"], found["position_ids"]
    if positions is None:
        positions = torch.arange(embeddings.shape[1]).expand(1, *embeddings.shape[:2])
    return embeddings, positions[-3:]


def logits(
    prompts: Prompts,
    drops: Sequence[Drop],
    new: Tensor | None = None,
    *,
    renumber: bool = False,
    exact: Prompts | None = None,
    **more: Any,
) -> Tensor:
    """As `oracle.logits`: [B, L + new, vocabulary] in float64, 0 where a column is dropped or padding."""
    exact = exact or in_float64(prompts)
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
        for name, state in (("linear_attn", gated_delta_net), ("conv", short_convolution)):
            if hasattr(layer, name):
                getattr(layer, name).forward = functools.partial(state, getattr(layer, name))
    with torch.no_grad(), clear_routing():
        embeddings, positions = _given_to_decoder(exact, inputs, more)
        rows = []
        for b, real in enumerate(inputs["attention_mask"].bool()):
            gone = [pad(drop.columns[b], (0, len(real) - length)) for drop in drops]
            lost = [g for g, drop in zip(gone, drops, strict=True) if drop.everywhere_for_new_rows]
            here["lost"] = torch.stack([torch.zeros_like(real), *lost]).any(0)
            columns = real.nonzero().squeeze(1)
            hidden, numbered = embeddings[b : b + 1, columns], positions[:, b : b + 1]
            for index, layer in enumerate(decoder.layers):
                for g, drop in zip(gone, drops, strict=True):
                    if drop.layer == index:
                        stays = ~g[columns]
                        columns, hidden = columns[stays], hidden[:, stays]
                        if renumber:
                            numbered = numbered.clone()
                            numbered[..., columns] = torch.arange(len(columns))
                here["columns"] = columns
                at = numbered[..., columns]
                rotary = decoder.rotary_emb(hidden, at if len(at) == 3 else at[0])
                hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
            norm = decoder.norm if hasattr(decoder, "norm") else decoder.embedding_norm
            last = exact.model.lm_head(norm(hidden))
            rows.append(last.new_zeros(len(real), last.shape[-1]).index_copy(0, columns, last[0]))
    return torch.stack(rows)
