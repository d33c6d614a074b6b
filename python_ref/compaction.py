"""Keeping the selected tokens of any number of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import entries

# Those that torch gathers, with a gradient. All others, Float8, unsigned integers and half-precision complex numbers
# among them, are moved as the integers of their size.
_DIFFERENTIABLE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _gather(tensor: Tensor, indices: Tensor, dim: int, batch_dim: int) -> Tensor:
    if tensor.dtype not in _DIFFERENTIABLE and tensor.dtype not in _INTEGERS.values():
        integers = tensor.resolve_conj().view(_INTEGERS[tensor.element_size()])
        return _gather(integers, indices, dim, batch_dim).view(tensor.dtype)
    front = tensor.movedim((batch_dim, dim), (0, 1))  # [B, T, ...]
    index, valid = entries(indices, front.shape[1])
    shape = indices.shape + (1,) * (front.dim() - 2)
    if front.shape[1] == 0:
        kept = front.new_zeros(indices.shape + front.shape[2:])
    else:
        kept = torch.where(valid.view(shape), front.take_along_dim(index.view(shape), dim=1), front.new_zeros(()))
    return kept.movedim((0, 1), (batch_dim, dim)).contiguous()


def gather_compact(
    tensors: Sequence[Tensor], indices: Tensor, *, dims: Sequence[int], batch_dims: Sequence[int] | None = None
) -> list[Tensor]:
    """out[b, ..., n, ...] = t[b, ..., indices[b, n], ...] for each tensor t; an index of -1 gives zeros."""
    batch_dims = [0] * len(tensors) if batch_dims is None else batch_dims
    return [_gather(t, indices, d, b) for t, d, b in zip(tensors, dims, batch_dims, strict=True)]


def _invert_indices(indices: Tensor, size: int) -> Tensor:
    """[B, size]: for each token the slot n with indices[b, n] = token, or -1. Gathering with it undoes a gather."""
    inside = (indices >= 0) & (indices < size)
    padded = indices.new_full((indices.shape[0], size + 1), -1)  # the last column takes what is no token
    slots = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
    return padded.scatter_reduce(1, torch.where(inside, indices, size), slots, "amax")[:, :size].contiguous()
