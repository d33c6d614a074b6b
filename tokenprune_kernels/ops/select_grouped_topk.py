"""torch.ops.tokenprune.select_grouped_topk: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Budget, Count, counts, flags, floats, integers, op, picks


@op(
    scores=floats("B N"),
    groups=integers("B N"),
    budgets=integers("B G"),
    k=Count(),
    mask=flags("B N"),
    returns={"indices": picks("B k"), "counts": counts("B")},
    backends=KERNELS,
)
def select_grouped_topk(
    scores: Tensor,
    groups: Tensor,
    budgets: Tensor,
    k: Budget,
    *,
    mask: Tensor | None = None,
    largest: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The best tokens of every group, each group with a budget of its own: a frame of a video, a crop of an image.

    Args:
        scores: [B, N], float16, bfloat16, float32 or float64.
        groups: [B, N] int64, the group of each token; tokens of a group outside [0, G) are never selected.
        budgets: [B, G] int64, how many tokens each group keeps; they stay on the device. Negative counts as 0.
        k: the capacity of the result, >= 0. When the budgets allow more tokens, the first k of them are returned. Or as
            in `select_topk` a share of N, or a number for each sample.
        mask: [B, N] bool, True for the tokens that may be selected; default all.
        largest: False selects the smallest of each group instead. NaN stays last.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, k] int64, ascending over all groups together, -1 after the last, and counts [B] int64.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> scores = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.3, 0.2]])
    >>> frame = torch.tensor([[0, 0, 0, 1, 1, 1]])
    >>> tp.select_grouped_topk(scores, frame, torch.tensor([[1, 2]]), 4)
    (tensor([[ 0,  4,  5, -1]]), tensor([3]))
    """
    return call("select_grouped_topk", backend, scores, groups, budgets, k, mask=mask, largest=largest)
