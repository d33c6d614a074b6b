"""Tensor-parallel models: the attention of a rank has some of the heads, and methods are given all of them.

Every rank then chooses by the same numbers, and keeps the same tokens. Between ranks the heads of one layer's queries
and keys are gathered, where a method reads them, in each prefill.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ...methods import get_method, method_names
from ...methods._method import ATTENTION, PROJECTED


def ranks_of(module: nn.Module) -> Any:
    """The process group that a module's parameters are split over while it runs, or None.

    They are DTensors then, of torch's and of transformers' tensor parallelism. FSDP has put its own together.
    """
    tensor: Any = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    for parameter in () if tensor is None else module.parameters():
        if isinstance(parameter, tensor.DTensor):
            for dim, placement in enumerate(parameter.placements):
                if placement.is_shard() and parameter.device_mesh.size(dim) > 1:
                    return parameter.device_mesh.get_group(dim)
    return None


def _gathered(t: Tensor, dim: int, ranks: Any) -> Tensor:
    """The parts of all ranks, which have one size, side by side in `dim`."""
    part = t.detach().contiguous()
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(ranks))]
    torch.distributed.all_gather(parts, part, group=ranks)
    return torch.cat(parts, dim)


def all_heads(
    module: nn.Module, config: Any, query: Tensor, key: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """query [B, H, M, D], key [B, Hkv, N, D] and lse [B, H, M] of one attention, with the heads of all ranks."""
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    if heads is None or query.shape[1] >= heads:
        return query, key, lse
    ranks = ranks_of(module)
    if ranks is not None:
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        query = _gathered(query, 1, ranks)
        key = _gathered(key, 1, ranks) if key.shape[1] < key_heads else key
        lse = None if lse is None else _gathered(lse, 1, ranks)
        if query.shape[1] == heads and key.shape[1] == key_heads:
            return query, key, lse
    raise NotImplementedError(
        f"prune_visual_tokens: {type(module).__name__} gives its attention {query.shape[1]} of {heads} heads, so "
        "this model is tensor-parallel, and no DTensor among its parameters tells which ranks have the others. "
        "Methods that work before the language model and read no attention "
        f"({', '.join(_blind())}) do not have to see all heads"
    )


def _blind() -> list[str]:
    """The methods that read the attention of neither the decoder nor the vision tower."""
    methods = map(get_method, method_names())
    return [m.name for m in methods if not m.uses & (ATTENTION | PROJECTED | {"saliency"})]


def all_features(linear: nn.Module, output: Tensor) -> Tensor:
    """What a linear layer gave [..., C], with the features of all ranks."""
    ranks = ranks_of(linear)
    if ranks is None or output.shape[-1] == getattr(linear, "out_features", None):
        return output
    return _gathered(output, -1, ranks)


def same_generator(module: nn.Module, device: torch.device) -> torch.Generator | None:
    """A generator that draws the same on all ranks of a module, or None where there is but one."""
    ranks = ranks_of(module)
    if ranks is None:
        return None
    seed = torch.randint(1 << 62, (1,), device=device)
    torch.distributed.broadcast(seed, group=ranks, group_src=0)
    return torch.Generator(device).manual_seed(int(seed))
