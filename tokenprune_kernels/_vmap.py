"""vmap of every op: the mapped dimension is folded into the batch, so that one call serves it.

torch.library.register_vmap refuses keyword-only tensors, so the rule is registered at the dispatch key it would use.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _level_and_size() -> tuple[int, int]:
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    interpreter: Any = retrieve_current_functorch_interpreter()
    return interpreter.level(), interpreter.batch_size()


def _fold(op: str, value: Tensor, level: int, size: int, batch_dim: int) -> Tensor:
    """[.., B, ..] mapped over a hidden dimension -> [.., V * B, ..]; a tensor that is not mapped is repeated."""
    if value.dim() == 0:
        raise RuntimeError(f"tokenprune::{op}: tensors must have a batch dimension, got one of shape [] under vmap")
    batch_dim %= value.dim()
    plain, mapped_dim = torch._C._functorch._unwrap_batched(value, level)
    moved = plain.unsqueeze(batch_dim) if mapped_dim is None else plain.movedim(mapped_dim, batch_dim)
    shape = list(moved.shape)
    shape[batch_dim] = size
    return moved.expand(shape).flatten(batch_dim, batch_dim + 1)


def _unfold(value: Tensor, level: int, size: int, batch: int, batch_dim: int) -> Tensor:
    split = value.unflatten(batch_dim % value.dim(), (size, batch))
    result: Tensor = torch._C._functorch._add_batch_dim(split, batch_dim % value.dim(), level)
    return result


def _rule(ops: Any, name: str) -> Callable[..., Any]:
    def rule(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        level, size = _level_and_size()
        op = getattr(ops, name).default

        def fold(value: Any) -> Any:
            return _fold(name, value, level, size, 0) if isinstance(value, Tensor) else value

        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            result = op(*map(fold, args), **{key: fold(value) for key, value in kwargs.items()})
            if isinstance(result, Tensor):
                return _unfold(result, level, size, args[0].shape[0], 0)
            return tuple(_unfold(r, level, size, args[0].shape[0], 0) for r in result)

    return rule


def _gather_rule(
    ops: Any,
    keyset: Any,
    tensors: Sequence[Tensor],
    indices: Tensor,
    *,
    dims: Sequence[int],
    batch_dims: Sequence[int] | None = None,
) -> list[Tensor]:
    level, size = _level_and_size()
    batch_dims = [0] * len(tensors) if batch_dims is None else batch_dims
    with torch._C._ExcludeDispatchKeyGuard(_KEY):
        folded = [_fold("gather_compact", t, level, size, b) for t, b in zip(tensors, batch_dims, strict=True)]
        kept = ops.gather_compact.default(
            folded, _fold("gather_compact", indices, level, size, 0), dims=dims, batch_dims=batch_dims
        )
        return [_unfold(k, level, size, indices.shape[0], b) for k, b in zip(kept, batch_dims, strict=True)]


def _refuse_nested(name: str) -> Callable[..., Any]:
    """torch loops over the components of a nested tensor itself, and divides by their number, 0 too."""

    def rule(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"tokenprune::{name}: tensors must be dense, got a nested one under vmap; pad it, and mask the padding"
        )

    return rule


def register(library: torch.library.Library, ops: Any, names: Iterable[str]) -> None:
    """The vmap rules of these ops of a library; `ops` is its namespace below torch.ops."""
    for name in names:
        rule = partial(_gather_rule, ops) if name == "gather_compact" else _rule(ops, name)
        library.impl(name, rule, "FuncTorchBatched", with_keyset=True)
        library.impl(name, _refuse_nested(name), "BatchedNestedTensor")
