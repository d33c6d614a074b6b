"""torch.ops.tokenprune.paired_cosine: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, along, floats, op, scores


@op(a=floats("B N C"), b=floats("B N C", like="a"), returns=scores("B N"), shardings=(along("N"),), backends=KERNELS)
def paired_cosine(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """The cosine of each token of one list with the token at the same index of another: cos(a_i, b_i).

    EVS keeps the tokens of a video that differ most from the same token one frame earlier; both arguments are views of
    one tensor then, and nothing is copied.

    Args:
        a: [B, N, C], float16, bfloat16, float32 or float64, in any strides.
        b: [B, N, C], of the dtype of `a`; may share memory with it.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        Cosines [B, N]: float32, or float64 for float64 inputs. Vectors are normalised as x / max(||x||, 1e-12), so a
        zero vector has cosine 0 with everything; NaN stays NaN. The result carries no gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    >>> import torch, tokenprune_kernels as tp
    >>> video = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]).view(3, 1, 2)  # frames, tokens of a frame, C
    >>> tp.paired_cosine(video[1:], video[:-1])
    tensor([[1.],
            [0.]])
    """
    return call("paired_cosine", backend, a, b)
