"""torch.ops.tokenprune.score_entropy: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, flags, floats, op, scores


@op(scores=floats("B N"), mask=flags("B N"), returns=scores("B"), backends=KERNELS)
def score_entropy(
    scores: Tensor, *, mask: Tensor | None = None, normalized: bool = True, backend: str | None = None
) -> Tensor:
    """Entropy of each sample's scores taken as a distribution, p = max(s, 0) / sum: how spread out attention is.

    Args:
        scores: [B, N], float16, bfloat16, float32 or float64; negative and NaN count as 0.
        mask: [B, N] bool, True for the n tokens that count; default all.
        normalized: divide by log(n) and clamp to [0, 1]; False gives H = -sum p log p in nats.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        [B] float32 (float64 for float64). All-zero scores count as uniform; at most one token gives 0; a score of
        +inf leaves no distribution and gives NaN.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.score_entropy(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 7.0, 0.0, 0.0]]))
    tensor([1., 0.])
    """
    return call("score_entropy", backend, scores, mask=mask, normalized=normalized)
