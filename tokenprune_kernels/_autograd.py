"""The gradient of gather_compact, the one op that carries one.

torch.library.register_autograd would make every floating output require grad as soon as one input does, has no forward
mode, does not work under torch.func for ops on lists of tensors, and costs more per call; so the kernel of the Autograd
key is written out here.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import reference

_BELOW = torch._C._after_autograd_keyset


def _below(
    ops: Any,
    keyset: Any,
    tensors: Sequence[Tensor],
    indices: Tensor,
    dims: Sequence[int],
    batch_dims: Sequence[int] | None,
) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        kept: list[Tensor] = ops.gather_compact.default.redispatch(
            keyset & _BELOW, tensors, indices, dims=dims, batch_dims=batch_dims
        )
    return kept


def _gather_for(ops: Any, grads: Sequence[Tensor]) -> Any:
    """torch.autograd.grad(is_grads_batched=True) maps with a vmap of its own, which has no rules for lists."""
    if any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
        return reference.gather_compact
    return ops.gather_compact.default


class _GatherCompact(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        keyset: Any,
        indices: Tensor,
        dims: Sequence[int],
        batch_dims: Sequence[int] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        # A Function turns both modes off around its forward; outer levels of torch.func still need them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            kept = _below(ops, keyset, tensors, indices, dims, batch_dims)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.ops = ops
        ctx.dims = list(dims)
        ctx.batch_dims = list(batch_dims or [0] * len(tensors))
        ctx.tokens = [t.shape[d] for t, d in zip(tensors, dims, strict=True)]
        needed = ctx.needs_input_grad[5:]
        ctx.mark_non_differentiable(*(k for k, need in zip(kept, needed, strict=True) if not need))
        return tuple(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Each kept token's gradient goes back to that token, every other token gets zero.

        That is a gather too, with the inverse of the indices, and so differentiable itself. Tensors of one length,
        commonly all, share it.
        """
        (indices,) = ctx.saved_tensors
        back: list[Tensor | None] = [None] * len(grads)
        given = {i: grad for i, grad in enumerate(grads) if grad is not None}
        lengths: list[int] = []
        for i in given:
            if not any(ctx.tokens[i] == tokens for tokens in lengths):  # a symbolic length has no hash
                lengths.append(ctx.tokens[i])
        for tokens in lengths:
            alike = [i for i in given if ctx.tokens[i] == tokens]
            kept = [given[i] for i in alike]
            whole = _gather_for(ctx.ops, kept)(
                kept,
                ctx.ops._invert_indices.default(indices, tokens),
                dims=[ctx.dims[i] for i in alike],
                batch_dims=[ctx.batch_dims[i] for i in alike],
            )
            for i, grad in zip(alike, whole, strict=True):
                back[i] = grad
        return (None, None, None, None, None, *back)


def _with_tangents(
    ops: Any, tensors: Sequence[Tensor], indices: Tensor, dims: Sequence[int], batch_dims: Sequence[int] | None
) -> list[Tensor] | None:
    """Forward mode: the gather is linear, so its tangent is the gather of the tangents. None if there are none."""
    duals = [forward_ad.unpack_dual(t) for t in tensors]
    moving = [i for i, dual in enumerate(duals) if dual.tangent is not None]
    if not moving:
        return None
    op = ops.gather_compact.default
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
    ops: Any,
    keyset: Any,
    tensors: Sequence[Tensor],
    indices: Tensor,
    *,
    dims: Sequence[int],
    batch_dims: Sequence[int] | None = None,
) -> list[Tensor]:
    if forward_ad._current_level >= 0:
        kept = _with_tangents(ops, tensors, indices, dims, batch_dims)
        if kept is not None:
            return kept
    if torch.is_grad_enabled() and torch._C._any_requires_grad(tensors):
        # Under torch.func this kernel already runs for one level of transforms. Function.apply would start over with
        # all of them; the apply of its base class records this level only.
        apply = super(torch.autograd.Function, _GatherCompact).apply
        with enable_single_level_autograd_function():
            return list(apply(ops, keyset, indices, dims, batch_dims, *tensors))
    return _below(ops, keyset, tensors, indices, dims, batch_dims)


def register(library: torch.library.Library, ops: Any, names: Iterable[str]) -> None:
    """The autograd behaviour of these ops of a library; `ops` is its namespace below torch.ops.

    gather_compact is differentiable. Indices, scores and entropies carry no gradient: autograd is skipped, at no cost
    per call.
    """
    for name in names:
        if name != "gather_compact":
            library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    library.impl("gather_compact", partial(_gather_compact, ops), "Autograd", with_keyset=True)
