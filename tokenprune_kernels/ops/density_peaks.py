"""torch.ops.tokenprune.density_peaks: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, AtLeast, Budget, Count, counts, flags, floats, op, picks, scores


@op(
    features=floats("B N C"),
    k=Count(),
    neighbors=AtLeast(1),
    mask=flags("B N"),
    returns={"indices": picks("B k"), "counts": counts("B"), "density": scores("B N"), "distance": scores("B N")},
    work=("features", "B * N * N * C"),
    backends=KERNELS,
)
def density_peaks(
    features: Tensor, k: Budget, *, neighbors: int = 5, mask: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cluster centres by density peaks (DPC-kNN): tokens that are dense and far from every denser token.

    With d_ij = ||f_i - f_j|| / sqrt(C) and m_i the mean of the `neighbors` smallest d_ij^2, token i itself among them,
    the density is exp(-m_i). Token j is denser than i when m_j < m_i, or equal with j < i. The k largest
    log(distance_i) - m_i are selected, which is the order of density times distance without its underflow. SparseVLM
    (arXiv 2410.04417) and FlashVID (arXiv 2602.08024) merge pruned tokens into such centres. On the CPU the
    distances of up to 4096 valid tokens are in memory at once (64 MiB in float32); those of more are computed twice.

    Args:
        features: [B, N, C], float16, bfloat16, float32 or float64, in any strides.
        k: how many centres, >= 0; may exceed N. Or as in `select_topk` a share of N, or a number for each sample.
        neighbors: >= 1; where fewer tokens are valid, the mean is over what there is.
        mask: [B, N] bool, True for the tokens that take part; default all.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, k] int64, ascending, -1 after the last; counts [B] int64; density and distance [B, N], float32 or
        float64 for float64 features, 0 where masked. distance_i is the smallest d_ij to a denser token; the densest one
        has the largest d of all pairs. A distance that is NaN counts as absent, and a token with NaN comes last.
        Carries no gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> features = torch.tensor([0.0, 1.0, 2.0, 50.0, 51.0, 90.0]).view(1, 6, 1)
    >>> indices, counts, density, distance = tp.density_peaks(features, 2, neighbors=2)
    >>> indices
    tensor([[0, 3]])
    >>> distance
    tensor([[90.,  1.,  1., 48.,  1., 39.]])
    """
    return call("density_peaks", backend, features, k, neighbors=neighbors, mask=mask)
