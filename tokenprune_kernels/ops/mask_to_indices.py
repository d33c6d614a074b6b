"""torch.ops.tokenprune.mask_to_indices: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Count, counts, flags, op, picks


@op(
    mask=flags("B N"),
    capacity=Count(),
    returns={"indices": picks("B capacity"), "counts": counts("B")},
    backends=KERNELS,
)
def mask_to_indices(mask: Tensor, capacity: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Positions of True in ascending order, cut at `capacity`.

    A nonzero() whose result has a fixed shape, so that nothing waits for the device.

    Args:
        mask: [B, N] bool.
        capacity: length of the lists, >= 0; may exceed N.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, capacity] int64, ascending, -1 after the last, and counts [B] int64 = min(number of True, capacity).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or value.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.mask_to_indices(torch.tensor([[True, False, True]]), 4)
    (tensor([[ 0,  2, -1, -1]]), tensor([2]))
    """
    return call("mask_to_indices", backend, mask, capacity)
