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
    """Keep the selected tokens of every tensor of the list: out[b, ..., n, ...] = t[b, ..., indices[b, n], ...].

    Hidden states, position ids, masks and the KV caches of all layers go through one call, on the GPU one launch.

    Args:
        tensors: any dtypes and strides, on the device of `indices`.
        indices: [B, K] int64, the tokens to keep; -1 gives zeros. The selecting ops return this.
        dims: for each tensor its token dimension; negative counts from the back.
        batch_dims: for each tensor its batch dimension (of size B); default 0 for all.
        backend: `cuda`, `triton`, `cpu`, `reference` or `auto`; default: see `use_backend`.

    Returns:
        For each tensor a contiguous one with K in place of its token dimension. Differentiable in forward and backward
        mode, any number of times; indices must be unique within a sample for the gradient to be right.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        IndexError: an index lies outside [-1, tokens); on GPUs only with TOKENPRUNE_CHECK_INDICES=1.

    >>> import torch, tokenprune_kernels as tp
    >>> hidden = torch.arange(8.0).view(1, 4, 2)  # [B, T, C]
    >>> positions = torch.arange(12).view(3, 1, 4)  # [3, B, T], as multimodal rotary embeddings have them
    >>> indices, _ = tp.select_topk(torch.tensor([[0.2, 0.9, 0.1, 0.8]]), 2)
    >>> hidden, positions = tp.gather_compact([hidden, positions], indices, dims=[1, 2], batch_dims=[0, 1])
    >>> hidden
    tensor([[[2., 3.],
             [6., 7.]]])
    >>> positions[:, 0]
    tensor([[ 1,  3],
            [ 5,  7],
            [ 9, 11]])
    """
    _checks.gather_compact(tensors, indices, dims, batch_dims)
    result: list[Tensor] = implementation(backend, indices).gather_compact(
        tensors, indices, dims=dims, batch_dims=batch_dims
    )
    return result
