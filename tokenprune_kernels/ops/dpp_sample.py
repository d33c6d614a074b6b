"""torch.ops.tokenprune.dpp_sample: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Budget, Count, Number, counts, flags, floats, op, picks, scores


@op(
    features=floats("B N C"),
    k=Count(),
    quality=floats("B N"),
    mask=flags("B N"),
    epsilon=Number(0.0),
    returns={"indices": picks("B k", ascending=False), "gains": scores("B k"), "counts": counts("B")},
    work=("features", "B * N * N * C"),
    backends=KERNELS,
)
def dpp_sample(
    features: Tensor,
    k: Budget,
    *,
    quality: Tensor | None = None,
    mask: Tensor | None = None,
    epsilon: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pick tokens that are good and unlike each other: greedy MAP of a determinantal point process.

    The kernel is L_ij = q_i q_j cos(f_i, f_j); each step picks the token that multiplies the determinant of L over the
    picks by most (Chen et al., arXiv 1709.05135). CDPruner (arXiv 2506.10967) takes the relevance to the question for
    the quality.

    Args:
        features: [B, N, C], float16, bfloat16, float32 or float64, in any strides.
        k: how many to pick, >= 0; may exceed N and the rank of the features. Or as in `select_topk` a share of N, or a
            number for each sample.
        quality: q, [B, N], any floating dtype; default 1.
        mask: [B, N] bool, True for the tokens that may be picked; default all.
        epsilon: a gain of at most epsilon * q_j^2 counts as a rounding error: beyond the rank of the kernel, picks go
            by quality alone and change no other gain.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, k] int64 in the order of selection, -1 after the last; gains [B, k], float32 or float64 for float64
        features, what each pick multiplied the determinant by, 0 in padding; counts [B] int64. A token with a
        feature or a quality that is not finite is picked after all others. Carries no gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> features = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]])
    >>> tp.dpp_sample(features, 2)
    (tensor([[0, 2]]), tensor([[1., 1.]]), tensor([2]))
    >>> tp.dpp_sample(features, 2, quality=torch.tensor([[1.0, 2.0, 0.5]]))[:2]
    (tensor([[1, 2]]), tensor([[4.0000, 0.2500]]))
    """
    return call("dpp_sample", backend, features, k, quality=quality, mask=mask, epsilon=epsilon)
