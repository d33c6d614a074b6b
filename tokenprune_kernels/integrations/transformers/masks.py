"""The attention mask of a layer whose tokens are fewer than those the model made its mask for.

In a prefill it is the mask that the model hands to this layer, at the rows and columns that stay: whatever the model
decides of a window, a chunk or the tokens of one image, it decides for the whole prompt. For new tokens it follows from
the kind of layer (kinds.py) and the columns that the cached keys had in the prompt. Either way a window means a
distance in the prompt, however many tokens between are gone.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .attention import base_of
from .kinds import STATES, Sees


def check_one_sequence(positions: Any, mask: Any) -> None:
    """Without a mask, a jump in the positions is a border between packed sequences; their borders would be lost."""
    if mask is None and isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions.diff() != 1).any()):
        raise NotImplementedError(
            "prune_visual_tokens: without an attention_mask, position_ids that jump mean packed sequences; pass one"
        )


def sees_by(mask: Any, batch: int) -> Sees | None:
    """Which keys a query sees by a mask that the model made, a tensor [B, 1, L, L] or a block mask of flex attention.

    None for any other mask: it tells of padding alone.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4:
        visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(batch, -1, -1)
        return lambda sample, head, query, key: visible[sample, query, key]
    made: Sees | None = getattr(mask, "mask_mod", None)
    return made


def at_columns(sees: Sees, columns: Tensor, held: int = 0) -> Sees:
    """The same for tokens that were at these columns [B, N]; -1, padding, which is masked besides, sees what it may.

    held: so many keys are cached in front of the columns; queries count from there on, and rows of `sees` do not.
    """
    columns = columns.clamp_min(0)
    cached = torch.arange(held, device=columns.device).expand(len(columns), -1)
    keys = torch.cat([cached, columns + held], 1)
    return lambda sample, head, query, key: sees(sample, head, columns[sample, query - held], keys[sample, key])


def decoder_mask(
    config: Any,
    sees: Sees,
    *,
    as_it_is: bool,
    batch: int,
    queries: int,
    keys: int,
    padding: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """What the model's own mask function makes for `queries` new tokens after `keys - queries` cached ones.

    as_it_is: `sees` is the family's own, which an attention may do without a mask. padding: [B, keys] bool, True for
    real tokens, or None when all are. bias: [B, keys] that is added to the logits of the keys, or None. The result is
    what this attention function wants: a tensor, a block mask, the padding itself, or None.
    """
    name = base_of(config._attn_implementation)
    if bias is not None:
        check_takes_bias(config)
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:  # it gets no mask from the model either
        if padding is not None and not bool(padding.all()):
            raise NotImplementedError(f"prune_visual_tokens: padding needs a mask, and {name!r} has no mask function")
        return None
    function = ALL_MASK_ATTENTION_FUNCTIONS[name]
    indices: dict[str, Any]
    takes = inspect.signature(function).parameters
    if "cache_position" in takes:  # until transformers 5.11 or so
        indices = {"cache_position": torch.arange(keys - queries, keys, device=device)}
    elif "q_offset" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        indices = {"q_length": queries, "q_offset": keys - queries, "device": device}
    else:
        raise NotImplementedError(
            f"prune_visual_tokens: the mask function of {name!r} takes neither cache_position nor q_offset, only "
            f"{', '.join(takes)}; this version of transformers is not supported"
        )
    mask = function(
        batch_size=batch,
        kv_length=keys,
        kv_offset=0,
        mask_function=sees,
        attention_mask=padding,
        allow_is_causal_skip=as_it_is and bias is None,
        dtype=dtype,
        config=config,
        **indices,
    )
    if bias is None:
        return mask
    bias = bias.to(dtype)[:, None, None]
    return torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + bias


def check_takes_bias(config: Any) -> None:
    """Whether the attention adds its mask to the logits."""
    name = base_of(config._attn_implementation)
    if STATES.intersection(getattr(config, "layer_types", None) or ()):
        raise NotImplementedError(
            "prune_visual_tokens: calibrate=True adds to logits, and linear attention or convolutions have none"
        )
    if name not in ("sdpa", "eager"):
        raise NotImplementedError(
            "prune_visual_tokens: calibrate=True adds to the logits of the attention by its mask, which sdpa and eager "
            f"take, got {name!r}"
        )
