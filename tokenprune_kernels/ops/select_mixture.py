"""torch.ops.tokenprune.select_mixture: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Budget, Count, Number, counts, flags, floats, op, picks


@op(
    text_scores=floats("B N"),
    visual_scores=floats("B N"),
    k=Count(),
    floor=Number(0.0, 0.5),
    mask=flags("B N"),
    returns={"indices": picks("B k"), "counts": counts("B"), "num_text": counts("B")},
    backends=KERNELS,
)
def select_mixture(
    text_scores: Tensor,
    visual_scores: Tensor,
    k: Budget,
    *,
    floor: float = 0.25,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdaFV's adaptive mixture (arXiv 2501.09532): k slots shared between a text-guided and a visual ranking.

    With b = floor(floor * k), the first b tokens of each ranking are reserved. Of the R = k - 2b slots left, the text
    ranking gets r, the smallest r that maximises P_text(r) * P_visual(R - r), where P(r) is the sum of the r scores
    after the reserved ones. A token that both rankings keep counts once; the slots this frees go to the tokens with
    the largest share of either list, max(s_text / sum s_text, s_visual / sum s_visual).

    Args:
        text_scores: [B, N], float16, bfloat16, float32 or float64; negative and NaN count as 0.
        visual_scores: [B, N], likewise; the two dtypes may differ.
        k: how many to keep, >= 0; may exceed N. Or as in `select_topk` a share of N, or a number for each sample.
        floor: the part of k that each ranking is sure of, in [0, 0.5].
        mask: [B, N] bool, True for the tokens that may be selected; default all.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, k] int64, ascending, -1 after the last; counts [B] int64 = min(k, number of True); and
        num_text [B] int64 = b + r, the slots given to the text ranking.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> text = torch.tensor([[8.0, 0.0, 0.0, 0.0, 0.0, 0.0]])  # one token has all the mass: more would not add any
    >>> visual = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    >>> tp.select_mixture(text, visual, 4, floor=0.0)
    (tensor([[0, 1, 2, 3]]), tensor([4]), tensor([1]))
    """
    return call("select_mixture", backend, text_scores, visual_scores, k, floor=floor, mask=mask)
