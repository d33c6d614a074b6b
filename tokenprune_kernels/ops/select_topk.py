"""torch.ops.tokenprune.select_topk: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Budget, Count, counts, flags, floats, integers, op, picks


@op(
    scores=floats("B N"),
    k=Count(),
    mask=flags("B N"),
    budgets=integers("B"),
    returns={"indices": picks("B k"), "counts": counts("B")},
    backends=KERNELS,
)
def select_topk(
    scores: Tensor,
    k: Budget,
    *,
    mask: Tensor | None = None,
    largest: bool = True,
    budgets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best tokens of each sample, in ascending order of position.

    Unlike torch.topk, the result is ready for gathering: ascending, with ties, NaN and masked tokens in a fixed order.

    Args:
        scores: [B, N], float16, bfloat16, float32 or float64.
        k: how many to keep, >= 0; may exceed N. A float in (0, 1] is the share of the N tokens, rounded, 1 at least. A
            list (or a [B] tensor in CPU memory) has a number for each sample, and the largest is the k of the result.
        mask: [B, N] bool, True for the tokens that may be selected; default all.
        largest: False selects the k smallest instead. NaN stays last.
        budgets: [B] int64, how many each sample keeps of at most k; they stay on the device. Negative counts as 0.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, k] int64, ascending, -1 after the last, and counts [B] int64 = min(k, number of True), with
        budgets min(budgets[b], k, number of True).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> scores = torch.tensor([[0.1, 0.9, 0.5, 0.9]])
    >>> tp.select_topk(scores, 2)
    (tensor([[1, 3]]), tensor([2]))
    >>> tp.select_topk(scores, 3, mask=torch.tensor([[True, False, False, True]]))
    (tensor([[ 0,  3, -1]]), tensor([2]))
    >>> tp.select_topk(scores.expand(2, 4), 3, budgets=torch.tensor([3, 1]))
    (tensor([[ 1,  2,  3],
            [ 1, -1, -1]]), tensor([3, 1]))
    >>> tp.select_topk(scores.expand(2, 4), [0.75, 1])  # the same: three quarters of the tokens, and one
    (tensor([[ 1,  2,  3],
            [ 1, -1, -1]]), tensor([3, 1]))
    """
    return call("select_topk", backend, scores, k, mask=mask, largest=largest, budgets=budgets)
