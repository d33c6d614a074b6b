"""Cosine similarity of visual tokens to queries, and COAST's contrast between anchors and references."""

from torch import Tensor

from .. import _checks
from .._backend import implementation


def cosine_scores(
    features: Tensor,
    queries: Tensor,
    *,
    query_mask: Tensor | None = None,
    reduction: str = "max",
    backend: str | None = None,
) -> Tensor:
    """How similar each visual token is to a list of queries, by cosine: maximum or mean over the queries.

    ZSPAPrune (arXiv 2510.17197) scores tokens against the pooled prompt (M = 1), AdaFV (arXiv 2501.09532) against the
    words of the question. The N x M similarities are never stored.

    Args:
        features: visual tokens, [B, N, C], float16, bfloat16, float32 or float64, in any strides.
        queries: [B, M, C], of the dtype of `features`.
        query_mask: [B, M] bool, True where a query counts; all of them by default.
        reduction: `"max"` or `"mean"` over the queries that count.
        backend: `"cpu"`, `"cuda"`, `"triton"`, `"reference"` or `"auto"`; see `use_backend`.

    Returns:
        Scores [B, N]: float32, or float64 for float64 inputs. Vectors are normalised as x / max(||x||, 1e-12), so a
        zero vector has cosine 0 with everything. A sample without a query that counts gets 0, a NaN in a feature or in
        a query that counts gives NaN. The result carries no gradient.

    Raises:
        ValueError: a shape, device or `reduction` that does not fit.
        TypeError: a dtype that does not fit.

    >>> import torch, tokenprune_kernels as tp
    >>> features = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
    >>> queries = torch.tensor([[[1.0, 0.0], [-5.0, 0.0]]])
    >>> tp.cosine_scores(features, queries)
    tensor([[1., 0., 0.]])
    >>> tp.cosine_scores(features, queries, query_mask=torch.tensor([[False, True]]))[0, 0]
    tensor(-1.)
    """
    _checks.cosine_scores(features, queries, query_mask, reduction)
    result: Tensor = implementation(backend, features).cosine_scores(
        features, queries, query_mask=query_mask, reduction=reduction
    )
    return result


def contrastive_scores(
    features: Tensor, anchor_indices: Tensor, reference_indices: Tensor, *, backend: str | None = None
) -> Tensor:
    """How much closer each token is to the anchors than to the references, by cosine.

    COAST (arXiv 2605.09429): score(j) = max over anchors a of cos(f_j, f_a) - mean over references r of cos(f_j, f_r).

    Args:
        features: visual tokens, [B, N, C], float16, bfloat16, float32 or float64, in any strides.
        anchor_indices: [B, A] int64 positions in [0, N), -1 where there is no entry.
        reference_indices: [B, R] int64, likewise. An index that is listed twice counts twice in the mean.
        backend: `"cpu"`, `"cuda"`, `"triton"`, `"reference"` or `"auto"`; see `use_backend`.

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
    _checks.contrastive_scores(features, anchor_indices, reference_indices)
    result: Tensor = implementation(backend, features).contrastive_scores(features, anchor_indices, reference_indices)
    return result
