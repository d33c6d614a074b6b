"""Attention that shows its query and key: a registered function around the one the model already uses.

transformers looks its attention function and its mask function up by the name in the config. For the time of a `with`
block the name is ours; behind it the user's own function (sdpa, FlashAttention, flex or eager) does the attention.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# probe(query [B, H, M, D], key [B, Hkv, N, D], scale, lse [B, H, M] or None, keyword arguments of the attention)
Probe = Callable[[Tensor, Tensor, float, Tensor | None, dict[str, Any]], None]

_PREFIX = "tokenprune"
_numbers = itertools.count()


def base_of(name: str) -> str:
    """The user's attention function behind one of our names."""
    return name.split("|", 2)[2] if name.startswith(_PREFIX + "|") else name


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """Eager attention is no registered function: each modelling file has its own."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise NotImplementedError(f"{type(module).__name__} has no eager_attention_forward beside it")
    found: Callable[..., Any] = function
    return found


def _lse(result: Any, query: Tensor) -> Tensor | None:
    """The log-sum-exp that the attention offers in place of its weights, as flex attention does.

    Not when it was rounded to a half type: at 10, bfloat16 is 3% off in the probability that comes of it.
    """
    second = result[1] if isinstance(result, (tuple, list)) and len(result) > 1 else None
    wide = (torch.float32, torch.float64)
    if isinstance(second, Tensor) and second.shape == query.shape[:3] and second.dtype in wide:
        return second
    return None


class ShownAttention:
    """Puts a name of ours into a config, and takes it out again.

    The name is new each time: compiled code depends on it, so that code compiled outside the block, or for another
    block, does not run inside.
    """

    def __init__(self, config: Any, probes: dict[nn.Module, Probe]) -> None:
        self._config, self._probes = config, probes
        self._before: str | None = None
        self._name = ""

    def install(self) -> None:
        name = self._config._attn_implementation
        if name.startswith(_PREFIX + "|"):
            raise RuntimeError(
                "prune_visual_tokens: this model, or one that shares its config, is being pruned already; "
                "leave that block first"
            )
        # No "flash" of our own: transformers decides by that word in the name which arguments attention gets.
        self._name = f"{_PREFIX}|{next(_numbers)}|{name}"
        ALL_ATTENTION_FUNCTIONS.register(self._name, self._function(name))
        # A name without a mask function would lose the padding silently.
        if name in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(self._name, ALL_MASK_ATTENTION_FUNCTIONS[name])
        self._before = name
        self._config._attn_implementation = self._name

    def remove(self) -> None:
        if self._before is None:
            return
        self._config._attn_implementation = self._before
        self._before = None
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(self._name, None)

    def _function(self, name: str) -> Callable[..., Any]:
        registered = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        probes = self._probes

        config = self._config
        # FlashAttention and functions beside transformers' own look their name up again: they find the user's.
        reads_name = name not in ("eager", "sdpa", "flex_attention")

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            function = _eager_of(module) if registered is None else registered
            ours = config._attn_implementation
            if reads_name:
                config._attn_implementation = name
            try:
                result = function(module, query, key, value, attention_mask, *args, **kwargs)
            finally:
                if reads_name:
                    config._attn_implementation = ours
            probe = probes.get(module)
            if probe is not None:
                scale = kwargs.get("scaling")
                probe(query, key, query.shape[-1] ** -0.5 if scale is None else scale, _lse(result, query), kwargs)
            return result

        return attend
