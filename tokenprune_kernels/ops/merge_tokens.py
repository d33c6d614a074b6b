"""torch.ops.tokenprune.merge_tokens: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Choice, flags, floats, indices, op, picks, scores, values


@op(
    values=floats("B N D"),
    targets=indices("B K"),
    keys=floats("B N E"),
    assignment=indices("B N", into="K"),
    weights=floats("B N"),
    mask=flags("B N"),
    metric=Choice(("cosine", "euclidean")),
    returns={"merged": values("B K D"), "sizes": scores("B K"), "assignment": picks("B N", ascending=False)},
    work=("values", "B * N * K * max(D, E)"),
    backends=KERNELS,
)
def merge_tokens(
    values: Tensor,
    targets: Tensor,
    *,
    keys: Tensor | None = None,
    assignment: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: float | None = None,
    metric: str = "cosine",
    include_targets: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge every token into the kept token that it resembles most; each kept token becomes the mean of its own.

    VisionZip (arXiv 2412.04467) merges by the cosine of keys, SparseVLM (arXiv 2410.04417) by Euclidean distance. The
    N x K similarities are never stored, and sums ascend over the tokens, so that results do not vary.

    Args:
        values: [B, N, D], float16, bfloat16, float32 or float64: what is averaged.
        targets: [B, K] int64, the kept tokens; -1: no entry. Unique within a sample.
        keys: [B, N, E], any floating dtype: what is compared; default `values`.
        assignment: [B, N] int64 in [-1, K), who joins which target, used as it is; default: the nearest target.
        weights: [B, N], any floating dtype; default 1. Negative and NaN count as 0, and a token of weight 0 contributes
            nothing, whatever its values: the sizes of an earlier merge, for instance.
        mask: [B, N] bool, True for the tokens that take part; default all. Targets keep their entries in any case.
        threshold: join nothing below this cosine (above this distance with `metric="euclidean"`); default: no
            threshold.
        metric: `"cosine"`, or `"euclidean"` for ||key_i - key_target||. Ties go to the lowest slot.
        include_targets: False leaves the targets themselves out: `merged` is then the mean of the others.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        merged [B, K, D] in the dtype of `values`, 0 where nothing joined; sizes [B, K], float32 or float64 for float64
        values, the weights that joined; assignment [B, N] int64, -1 for tokens that joined nothing, because they are
        masked, have NaN in their key, are beyond the threshold, or there is no target. Carries no gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        IndexError: an entry of `targets` or `assignment` out of range; on GPUs only with TOKENPRUNE_CHECK_INDICES=1.

    >>> import torch, tokenprune_kernels as tp
    >>> values = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 9.0]]])
    >>> merged, sizes, assignment = tp.merge_tokens(values, torch.tensor([[0, 2]]))
    >>> merged
    tensor([[[2.0000, 0.0000],
             [0.3333, 4.0000]]])
    >>> sizes, assignment
    (tensor([[2., 3.]]), tensor([[0, 0, 1, 1, 1]]))
    """
    return call(
        "merge_tokens", backend, values, targets, keys=keys, assignment=assignment, weights=weights, mask=mask,
        threshold=threshold, metric=metric, include_targets=include_targets,
    )  # fmt: skip
