"""The gradient of gather_compact, the one op that carries one.

torch.library.register_autograd would make every floating output require grad as soon as one input does, has no forward
mode, does not work under torch.func for ops on lists of tensors, and costs more per call; so the kernel of the Autograd
key is written out here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

_BELOW = torch._C._after_autograd_keyset


def _below(
    keyset: Any, tensors: Sequence[Tensor], indices: Tensor, dims: Sequence[int], batch_dims: Sequence[int] | None
) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        kept: list[Tensor] = torch.ops.tokenprune.gather_compact.default.redispatch(
            keyset & _BELOW, tensors, indices, dims=dims, batch_dims=batch_dims
        )
    return kept


def _scatter_back(grad: Tensor, indices: Tensor, shape: torch.Size, dim: int, batch_dim: int) -> Tensor:
    """The transpose of the gather: each kept token's gradient goes back to its place, every other token gets zero."""
    front = grad.movedim((batch_dim, dim), (0, 1))
    # One extra slot swallows the -1 entries, so that no data-dependent shape appears.
    index = torch.where(indices < 0, shape[dim], indices).view(indices.shape + (1,) * (front.dim() - 2))
    padded = front.new_zeros((front.shape[0], shape[dim] + 1, *front.shape[2:]))
    padded = padded.scatter(1, index.expand_as(front), front)
    return padded[:, :-1].movedim((0, 1), (batch_dim, dim))


class _GatherCompact(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        indices: Tensor,
        dims: Sequence[int],
        batch_dims: Sequence[int] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        # A Function turns both modes off around its forward; outer levels of torch.func still need them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            kept = _below(keyset, tensors, indices, dims, batch_dims)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.shapes = [t.shape for t in tensors]
        ctx.dims = list(dims)
        ctx.batch_dims = list(batch_dims or [0] * len(tensors))
        needed = ctx.needs_input_grad[4:]
        ctx.mark_non_differentiable(*(k for k, need in zip(kept, needed, strict=True) if not need))
        return tuple(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (indices,) = ctx.saved_tensors
        # Made of differentiable operations, so that the gradient has a gradient itself.
        back = [
            None if grad is None else _scatter_back(grad, indices, shape, dim, batch_dim)
            for grad, shape, dim, batch_dim in zip(grads, ctx.shapes, ctx.dims, ctx.batch_dims, strict=True)
        ]
        return (None, None, None, None, *back)


def _with_tangents(
    tensors: Sequence[Tensor], indices: Tensor, dims: Sequence[int], batch_dims: Sequence[int] | None
) -> list[Tensor] | None:
    """Forward mode: the gather is linear, so its tangent is the gather of the tangents. None if there are none."""
    duals = [forward_ad.unpack_dual(t) for t in tensors]
    moving = [i for i, dual in enumerate(duals) if dual.tangent is not None]
    if not moving:
        return None
    op = torch.ops.tokenprune.gather_compact.default
    kept: list[Tensor] = op([dual.primal for dual in duals], indices, dims=dims, batch_dims=batch_dims)
    tangents = op(
        [duals[i].tangent for i in moving],
        indices,
        dims=[dims[i] for i in moving],
        batch_dims=[batch_dims[i] for i in moving] if batch_dims else None,
    )
    for i, tangent in zip(moving, tangents, strict=True):
        kept[i] = forward_ad.make_dual(kept[i], tangent)
    return kept


def _gather_compact(
    keyset: Any,
    tensors: Sequence[Tensor],
    indices: Tensor,
    *,
    dims: Sequence[int],
    batch_dims: Sequence[int] | None = None,
) -> list[Tensor]:
    if forward_ad._current_level >= 0:
        kept = _with_tangents(tensors, indices, dims, batch_dims)
        if kept is not None:
            return kept
    if torch.is_grad_enabled() and torch._C._any_requires_grad(tensors):
        # Under torch.func this kernel already runs for one level of transforms. Function.apply would start over with
        # all of them; the apply of its base class records this level only.
        apply = super(torch.autograd.Function, _GatherCompact).apply
        with enable_single_level_autograd_function():
            return list(apply(keyset, indices, dims, batch_dims, *tensors))
    return _below(keyset, tensors, indices, dims, batch_dims)


def register(library: torch.library.Library) -> None:
    library.impl("gather_compact", _gather_compact, "Autograd", with_keyset=True)
