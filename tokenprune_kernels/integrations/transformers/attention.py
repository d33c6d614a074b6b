"""Attention that shows its query and key: a registered function around the one the model already uses.

transformers looks its attention function and its mask function up by the name in the config. For the time of a `with`
block the name is ours; behind it the user's own function (sdpa, FlashAttention, flex or eager) does the attention.
"""

import copy
import functools
import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .parallel import all_heads

# heads() -> query [B, H, M, D], key [B, Hkv, N, D], lse [B, H, M] or None; of a tensor-parallel model it gathers them.
Heads = Callable[[], tuple[Tensor, Tensor, Tensor | None]]

# probe(heads, scale, keyword arguments of the attention)
Probe = Callable[[Heads, float, dict[str, Any]], None]

# projecting(heads, scale): whether the attention is called for these alone, and need not attend.
Projecting = Callable[[Heads, float], bool]

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
    """The log-sum-exp that the attention offers instead of its weights, as flex attention does.

    None when it was rounded to a half type: at 10, bfloat16 is 3% off in the probability that comes of it.
    """
    second = result[1] if isinstance(result, (tuple, list)) and len(result) > 1 else None
    wide = (torch.float32, torch.float64)
    if isinstance(second, Tensor) and second.shape == query.shape[:3] and second.dtype in wide:
        return second
    return None


def _with_config(module: nn.Module, config: Any) -> nn.Module:
    """The module in every respect but this one. The config itself cannot change: other threads read it meanwhile."""
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(vars(module), config=config)
    return twin


class _Probed:
    """One config that bears a name of ours, and the blocks whose probes are behind it.

    The name is new each time: compiled code depends on it, so that code compiled outside a block, or for another
    block, does not run inside. Old names stay registered to the last, for calls in other threads that have read them.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.base: str = config._attn_implementation
        self.names: list[str] = []
        self.blocks: list[ProbedAttention] = []

    def rename(self) -> None:
        self.base = base_of(self.config._attn_implementation)
        # No "flash" of our own: transformers decides by that word in the name which arguments attention gets.
        name = f"{_PREFIX}|{next(_numbers)}|{self.base}"
        ALL_ATTENTION_FUNCTIONS.register(name, self._function())
        # A name without a mask function would lose the padding silently.
        if self.base in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[self.base])
        self.names.append(name)
        self.config._attn_implementation = name

    def forget(self) -> None:
        self.config._attn_implementation = base_of(self.config._attn_implementation)
        for name in self.names:
            for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                registry._global_mapping.pop(name, None)

    def _function(self) -> Callable[..., Any]:
        name, config = self.base, self.config
        registered = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        probes: dict[nn.Module, list[Probe]] = {}
        projecting: dict[nn.Module, Projecting] = {}  # of one block: only those of vision towers share a config
        for block in self.blocks:
            projecting.update(block.projecting)
            for module, probe in block.probes.items():
                probes.setdefault(module, []).append(probe)
        # FlashAttention and functions beside transformers' own look their name up again: they find the user's.
        users_config = None
        if name not in ("eager", "sdpa", "flex_attention"):
            users_config = copy.copy(config)
            users_config._attn_implementation = name
        uncompiled = torch.compiler.disable(_with_config)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
            heads = functools.partial(all_heads, module, config, query, key)
            if module in projecting and projecting[module](functools.partial(heads, None), scale):
                return query.new_zeros(()).expand(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
            function = _eager_of(module) if registered is None else registered
            told = module if users_config is None else uncompiled(module, users_config)
            result = function(told, query, key, value, attention_mask, *args, **kwargs)
            for probe in probes.get(module, ()):
                probe(functools.partial(heads, _lse(result, query)), scale, kwargs)
            return result

        return attend


_probed: dict[int, _Probed] = {}  # by the id of its config, which it keeps alive
_lock = threading.RLock()


class ProbedAttention:
    """Puts a name of ours into a config, and takes it out again. shared: other blocks may probe this config too."""

    def __init__(
        self, config: Any, probes: dict[nn.Module, Probe], projecting: dict[nn.Module, Projecting], *,
        shared: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.probes, self.projecting, self.shared = config, probes, projecting, shared

    def install(self) -> None:
        with _lock:
            there = _probed.get(id(self.config))
            if there is not None and not (self.shared and all(block.shared for block in there.blocks)):
                raise RuntimeError(
                    "prune_visual_tokens: this model, or one that shares its config, is being pruned already; "
                    "leave that block first"
                )
            there = _probed.setdefault(id(self.config), _Probed(self.config))
            there.blocks.append(self)
            there.rename()

    def follow(self) -> None:
        """The user's set_attn_implementation inside the block put another name there: go on in front of that one."""
        there = _probed.get(id(self.config))
        if there is not None and self.config._attn_implementation != there.names[-1]:
            with _lock:
                if self.config._attn_implementation not in there.names:
                    there.rename()

    def remove(self) -> None:
        with _lock:
            there = _probed.get(id(self.config))
            if there is None or self not in there.blocks:
                return
            there.blocks.remove(self)
            if there.blocks:
                there.rename()
            else:
                there.forget()
                del _probed[id(self.config)]
