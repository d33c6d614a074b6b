"""The kinds of decoder layers, as in config.layer_types: which keys each lets a query see, and how it rotates."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from .attention import base_of
from .families import Family, Model

FULL = "full_attention"
# A state in place of keys: the mask of such a layer is of the padding alone, [B, L] or None.
STATES = frozenset({"linear_attention", "conv"})

# sees(sample, head, query, key): which keys a query sees, as transformers' mask functions take it.
Sees = Callable[..., Any]


def kind_of(config: Any, layer: int) -> str:
    """What a decoder layer is: by the list of the layers' types or, without one, by what all layers have."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return str(types[layer])
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return FULL if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


def check_kinds(config: Any, family: Family, layers: int) -> None:
    """Whether all decoder layers are of kinds that the family serves, with an attention function that suits them."""
    both_ways = getattr(config, "use_bidirectional_attention", None) in (True, "all") and family.prefix is None
    if both_ways or not getattr(config, "is_causal", True):
        raise NotImplementedError(
            "prune_visual_tokens: a decoder with use_bidirectional_attention for all tokens embeds prompts, and is not "
            "supported"
        )
    kinds = {kind_of(config, layer) for layer in range(layers)}
    if not kinds <= family.layer_types:
        known = " or ".join(sorted(family.layer_types)).replace("_", " ")
        raise NotImplementedError(
            f"prune_visual_tokens: decoder layers must all have {known}, got {', '.join(sorted(kinds))}"
        )
    for kind in kinds:
        check_attention(config, kind)


def check_shared(config: Any, layers: Sequence[Model], at: int) -> None:
    """Whether no layer reuses keys and values that were made in front of layer `at`, where some are dropped."""
    shared = [bool(getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False)) for layer in layers]
    if True not in shared:
        return
    first = shared.index(True)
    reused = {kind_of(config, index) for index in range(first, len(layers))}
    makers = [max(index for index in range(first) if kind_of(config, index) == kind) for kind in reused]
    if at > min(makers):
        raise NotImplementedError(
            f"prune_visual_tokens: layers from {first} on reuse keys and values, some of them those of layer "
            f"{min(makers)}; tokens can be dropped in front of that layer at the latest, got layer {at}"
        )


def check_counts(family: Family, config: Any, tokens: int) -> None:
    """Whether layers that count the tokens in their caches do not do so yet."""
    limit = family.counted_to(config)
    if limit is not None and tokens >= limit:
        raise NotImplementedError(
            f"prune_visual_tokens: from {limit} tokens on layers of {family.name} scale their queries by the number of "
            f"tokens in their caches (attn_temperature_tuning), where some are gone; got {tokens}"
        )


def check_attention(config: Any, kind: str) -> None:
    """A window that the attention function counts by itself is one of tokens, and some of them are gone."""
    name = base_of(config._attn_implementation)
    if kind not in {FULL, *STATES} and ("flash" in name or name not in ALL_MASK_ATTENTION_FUNCTIONS):
        raise NotImplementedError(
            f"prune_visual_tokens: layers with {kind} need an attention function that takes any mask (sdpa, eager or "
            f"flex_attention), got {name!r}, which counts a window by tokens"
        )


def sees_of(family: Family, config: Any, kind: str, padded: Tensor) -> Sees:
    """Which keys a new token of text sees, on columns of the conversation. padded [B]: columns of padding in front."""
    if kind == "sliding_attention":
        return sliding_window_causal_mask_function(config.sliding_window)
    if kind == "chunked_attention":
        return chunked_causal_mask_function(config.attention_chunk_size, padded)
    return family.mask_function


def alike(family: Family, decoder: Model, layer: int) -> tuple[str, Model]:
    """What the layers have in common that get the same mask and rotary embeddings."""
    return kind_of(decoder.config, layer), family.rotary(decoder, layer)


def rotary_of(family: Family, decoder: Model, layer: int, hidden: Tensor, positions: Tensor) -> Any:
    """The rotary embeddings of a layer at these positions [B, L]."""
    rotary: nn.Module = family.rotary(decoder, layer)
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    kind = {"layer_type": kind_of(decoder.config, layer)} if by_kind else {}
    return rotary(hidden, position_ids=positions, **kind)
