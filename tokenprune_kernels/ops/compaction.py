"""Keeping the selected tokens of any number of tensors in one call."""

from collections.abc import Sequence

from torch import Tensor

from .. import _checks
from .._backend import implementation


def gather_compact(
    tensors: Sequence[Tensor],
    indices: Tensor,
    *,
    dims: Sequence[int],
    batch_dims: Sequence[int] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """out[b, ..., n, ...] = t[b, ..., indices[b, n], ...] for each tensor t; an index of -1 gives zeros."""
    _checks.gather_compact(tensors, indices, dims, batch_dims)
    result: list[Tensor] = implementation(backend, indices).gather_compact(
        tensors, indices, dims=dims, batch_dims=batch_dims
    )
    return result
