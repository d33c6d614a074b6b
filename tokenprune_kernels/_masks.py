"""Index lists as masks, which engines want: the way back from `mask_to_indices`."""

import torch
from torch import Tensor

from ._advice import of_value
from ._checks import check_count
from ._convert import as_integer
from ._op import INDEX_DTYPES


def indices_to_mask(indices: Tensor, size: int) -> Tensor:
    """The tokens that an index list names, as a mask.

    The inverse of `mask_to_indices`. Nothing is read on the host, so that a GPU is not waited for.

    Args:
        indices: [B, K] int64 (or int32, int16, int8), in any order, also with repetitions. -1 names no token, and nor
            does any other entry outside [0, size): to report one, the host would have to wait for the device.
        size: how many tokens a sample has, >= 0.

    Returns:
        [B, size] bool on the device of `indices`, True where a token is named.

    Raises:
        TypeError: `indices` is no tensor of signed integers, or `size` no integer.
        ValueError: `indices` is not two-dimensional, or `size` is negative.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.indices_to_mask(torch.tensor([[0, 2, -1]]), 4)
    tensor([[ True, False,  True, False]])
    """
    if not isinstance(indices, Tensor) or indices.dtype not in INDEX_DTYPES:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        instead = "type indices.long()" if isinstance(indices, Tensor) else of_value("indices", indices)
        instead = "it is a mask already" if got is torch.bool else instead
        raise TypeError(f"indices_to_mask: indices must be an int64 tensor, got {got}; {instead}")
    if indices.dim() != 2:
        raise ValueError(f"indices_to_mask: indices must have shape [B, K], got {list(indices.shape)}")
    size = check_count("indices_to_mask", "size", as_integer(size))
    indices = indices.long()
    named = (indices >= 0) & (indices < size)
    # The last column takes what names no token.
    mask = indices.new_zeros((indices.shape[0], size + 1), dtype=torch.bool)
    return mask.scatter_(1, torch.where(named, indices, size), True)[:, :size].contiguous()
