"""torch.ops.tokenprune.mask_to_indices: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Budget, Count, counts, flags, op, picks


@op(
    mask=flags("B N"),
    capacity=Count(),
    returns={"indices": picks("B capacity"), "counts": counts("B")},
    backends=KERNELS,
)
def mask_to_indices(
    mask: Tensor, capacity: Budget | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Positions of True in ascending order, cut at `capacity`.

    A nonzero() whose result has a fixed shape, so that nothing waits for the device.

    Args:
        mask: [B, N] bool.
        capacity: length of the lists, >= 0; may exceed N. Default: N, which all of them fit into. Or as k of
            `select_topk` a share of N, or a number for each sample.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, capacity] int64, ascending, -1 after the last, and counts [B] int64 = min(number of True, capacity).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or value.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.mask_to_indices(torch.tensor([[True, False, True]]), 2)
    (tensor([[0, 2]]), tensor([2]))
    >>> tp.mask_to_indices(torch.tensor([[True, False, True]]))
    (tensor([[ 0,  2, -1]]), tensor([2]))
    """
    if capacity is None:  # of a mask that is none, the check says so
        capacity = mask.shape[-1] if isinstance(mask, Tensor) and not mask.is_nested and mask.dim() else 0
    return call("mask_to_indices", backend, mask, capacity)
