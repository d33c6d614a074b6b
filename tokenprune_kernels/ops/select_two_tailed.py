"""torch.ops.tokenprune.select_two_tailed: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Budget, Count, counts, flags, floats, integers, op, picks


@op(
    scores=floats("B N"),
    num_low=integers("B"),
    k=Count(),
    mask=flags("B N"),
    returns={"indices": picks("B k"), "counts": counts("B")},
    backends=KERNELS,
)
def select_two_tailed(
    scores: Tensor, num_low: Tensor, k: Budget, *, mask: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k - n highest tokens and the n lowest of what is left, n = clamp(num_low, 0, k).

    COAST keeps its context this way: tokens unlike the anchors next to tokens like them, in a proportion that follows
    from the entropy of the scores. `num_low` is a tensor, so that it never has to leave the device.

    Args:
        scores: [B, N], float16, bfloat16, float32 or float64.
        num_low: [B] int64, how many of the k go to the lowest scores; values outside [0, k] are clamped.
        k: how many to keep in all, >= 0; may exceed N. Or as in `select_topk` a share of N, or a number per sample.
        mask: [B, N] bool, True for the tokens that may be selected; default all.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, k] int64, ascending, -1 after the last, and counts [B] int64 = min(k, number of True).
        NaN comes last at both ends.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.select_two_tailed(torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]]), torch.tensor([1]), 3)
    (tensor([[0, 1, 2]]), tensor([3]))
    """
    return call("select_two_tailed", backend, scores, num_low, k, mask=mask)
