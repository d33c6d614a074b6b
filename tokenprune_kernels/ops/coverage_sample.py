"""torch.ops.tokenprune.coverage_sample: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Budget, Count, counts, flags, floats, op, picks, scores


@op(
    similarity=floats("B R N"),
    k=Count(),
    row_weights=floats("B R"),
    quality=floats("B N"),
    row_mask=flags("B R"),
    mask=flags("B N"),
    returns={"indices": picks("B k", ascending=False), "gains": scores("B k"), "counts": counts("B")},
    work=("similarity", "B * min(k, N) * R * N"),
    backends=KERNELS,
)
def coverage_sample(
    similarity: Tensor,
    k: Budget,
    *,
    row_weights: Tensor | None = None,
    quality: Tensor | None = None,
    row_mask: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pick tokens that together cover all rows well: greedy facility location.

    Row r is covered as well as by the most similar token picked so far, C_r. Each step picks the token with the largest
    gain quality_n * sum_r row_weights_r * max(similarity[r, n] - C_r, 0). SCOPE (arXiv 2510.24214) covers the image,
    with saliency for the quality, MMTok (arXiv 2508.18264) the image and the words of the question.

    Args:
        similarity: how well token n covers row r, [B, R, N], float16, bfloat16, float32 or float64. Values are finite;
            negative and NaN count as 0.
        k: how many to pick, >= 0; may exceed N. Or as in `select_topk` a share of N, or a number for each sample.
        row_weights: [B, R], any floating dtype; default 1. Negative and NaN count as 0.
        quality: [B, N], any floating dtype; default 1. Negative and NaN count as 0.
        row_mask: [B, R] bool, True for the rows that count; default all.
        mask: [B, N] bool, True for the tokens that may be picked; default all.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, k] int64 in the order of selection, -1 after the last; gains [B, k], float32 or float64 for float64
        similarities, 0 in padding; counts [B] int64. Carries no gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> similarity = torch.tensor([[[1.0, 0.5, 0.0], [1.0, 0.5, 0.0], [0.0, 0.5, 0.75]]])
    >>> tp.coverage_sample(similarity, 2)
    (tensor([[0, 2]]), tensor([[2.0000, 0.7500]]), tensor([2]))
    """
    return call(
        "coverage_sample", backend, similarity, k,
        row_weights=row_weights, quality=quality, row_mask=row_mask, mask=mask,
    )  # fmt: skip
