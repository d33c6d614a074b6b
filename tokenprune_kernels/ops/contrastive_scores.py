"""torch.ops.tokenprune.contrastive_scores: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, floats, indices, op, scores


@op(
    features=floats("B N C"),
    anchor_indices=indices("B A"),
    reference_indices=indices("B R"),
    returns=scores("B N"),
    work=("features", "B * N * max(A, R) * C"),
    backends=KERNELS,
)
def contrastive_scores(
    features: Tensor, anchor_indices: Tensor, reference_indices: Tensor, *, backend: str | None = None
) -> Tensor:
    """How much closer each token is to the anchors than to the references, by cosine.

    COAST (arXiv 2605.09429): score(j) = max over anchors a of cos(f_j, f_a) - mean over references r of cos(f_j, f_r).

    Args:
        features: visual tokens, [B, N, C], float16, bfloat16, float32 or float64, in any strides.
        anchor_indices: [B, A] int64 positions in [0, N), -1 where there is no entry.
        reference_indices: [B, R] int64, likewise. An index that is listed twice counts twice in the mean.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        Scores [B, N] of all tokens, the listed ones among them: float32, or float64 for float64 features. A list
        without entries contributes 0. The result carries no gradient.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that does not fit.
        IndexError: an index outside [-1, N) (on a GPU such an index counts as -1 unless TOKENPRUNE_CHECK_INDICES=1).

    >>> import torch, tokenprune_kernels as tp
    >>> features = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-4.0, 0.0]]])
    >>> tp.contrastive_scores(features, torch.tensor([[0, -1]]), torch.tensor([[1, 2]]))
    tensor([[ 1.5000, -0.5000, -1.5000]])
    """
    return call("contrastive_scores", backend, features, anchor_indices, reference_indices)
