"""The attention mask of a layer whose tokens are fewer than those the model made its mask for."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .attention import base_of
from .families import Family

LINEAR = "linear_attention"


def is_linear(config: Any, layer: int) -> bool:
    """Whether a decoder layer has a state in place of keys: its mask is of the padding alone, [B, L] or None."""
    types = getattr(config, "layer_types", None)
    return types is not None and types[layer] == LINEAR


def check_layer_types(config: Any, family: Family) -> None:
    """Whether all decoder layers are of the kinds that the family promises to handle."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    for name in ("sliding_window", "attention_chunk_size"):  # of all layers, where their types are not listed
        if getattr(config, name, None) is not None and getattr(config, "layer_types", None) is None:
            kinds = {name}
    if not kinds <= family.layer_types:
        known = " or ".join(sorted(family.layer_types)).replace("_", " ")
        raise NotImplementedError(
            f"prune_visual_tokens: decoder layers must all have {known}, got {', '.join(sorted(kinds))}"
        )


def check_one_sequence(positions: Any, mask: Any) -> None:
    """Without a mask, a jump in the positions is a border between packed sequences; their borders would be lost."""
    if mask is None and isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions.diff() != 1).any()):
        raise NotImplementedError(
            "prune_visual_tokens: without an attention_mask, position_ids that jump mean packed sequences; pass one"
        )


def decoder_mask(
    family: Family,
    config: Any,
    *,
    batch: int,
    queries: int,
    keys: int,
    padding: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """What the model's own mask function makes for `queries` new tokens after `keys - queries` cached ones.

    padding: [B, keys] bool, True for real tokens, or None when all are. bias: [B, keys] that is added to the logits of
    the keys, or None. The result is what this attention function wants: a tensor, a block mask, the padding itself, or
    None.
    """
    name = base_of(config._attn_implementation)
    if bias is not None:
        check_takes_bias(config)
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:  # it gets no mask from the model either
        if padding is not None and not bool(padding.all()):
            raise NotImplementedError(f"prune_visual_tokens: padding needs a mask, and {name!r} has no mask function")
        return None
    function = ALL_MASK_ATTENTION_FUNCTIONS[name]
    columns: dict[str, Any]
    takes = inspect.signature(function).parameters
    if "cache_position" in takes:  # until transformers 5.11 or so
        columns = {"cache_position": torch.arange(keys - queries, keys, device=device)}
    elif "q_offset" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        columns = {"q_length": queries, "q_offset": keys - queries, "device": device}
    else:
        raise NotImplementedError(
            f"prune_visual_tokens: the mask function of {name!r} takes neither cache_position nor q_offset, only "
            f"{', '.join(takes)}; this version of transformers is not supported"
        )
    mask = function(
        batch_size=batch,
        kv_length=keys,
        kv_offset=0,
        mask_function=family.mask_function,
        attention_mask=padding,
        allow_is_causal_skip=bias is None,
        dtype=dtype,
        config=config,
        **columns,
    )
    if bias is None:
        return mask
    bias = bias.to(dtype)[:, None, None]
    return torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + bias


def check_takes_bias(config: Any) -> None:
    """Whether the attention adds its mask to the logits."""
    name = base_of(config._attn_implementation)
    if LINEAR in (getattr(config, "layer_types", None) or ()):
        raise NotImplementedError(
            "prune_visual_tokens: calibrate=True adds to logits, and linear attention has no logits"
        )
    if name not in ("sdpa", "eager"):
        raise NotImplementedError(
            "prune_visual_tokens: calibrate=True adds to the logits of the attention by its mask, which sdpa and eager "
            f"take, got {name!r}"
        )
