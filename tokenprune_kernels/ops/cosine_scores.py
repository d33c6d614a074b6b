"""torch.ops.tokenprune.cosine_scores: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Choice, along, flags, floats, op, scores


@op(
    features=floats("B N C"),
    queries=floats("B M C", like="features"),
    query_mask=flags("B M"),
    reduction=Choice(("max", "mean")),
    returns=scores("B N"),
    work=("queries", "B * N * M * C"),
    shardings=(along("N"),),
    backends=KERNELS,
)
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
        backend: which implementation serves the call; see `use_backend`.

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
    return call("cosine_scores", backend, features, queries, query_mask=query_mask, reduction=reduction)
