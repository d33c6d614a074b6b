"""Rows of attention whose keys lie apart, on several ranks or in several calls, put together."""

import torch
from torch import Tensor


def merge_lse(lse: Tensor, dim: int = 0) -> Tensor:
    """The log-sum-exp of rows over all keys, from those over parts of the keys.

    lse = log(sum_r exp(lse_r)), r counts the parts along `dim`.

    Args:
        lse: float32 or float64, for instance [R, B, Hq, M], what `attention_entropy` gave for each of R parts.
        dim: the dimension of the parts, which the result lacks.

    A row that sees no key of any part has -inf. Parts may overlap in nothing: a key that is in two counts twice.

    >>> import math, torch
    >>> from tokenprune_kernels.distributed import merge_lse
    >>> merge_lse(torch.tensor([[math.log(3.0)], [-math.inf], [math.log(5.0)]]))  # log 8
    tensor([2.0794])
    """
    return lse.logsumexp(dim)


def merge_entropy(entropy: Tensor, lse: Tensor, dim: int = 0) -> Tensor:
    """The entropy of rows over all keys, from entropies and log-sum-exps over parts of the keys.

    In one part, sum_j P_j s_j = lse_r - H_r, and all its keys together have the weight w_r = exp(lse_r - lse). Hence

        H = lse - sum_j P_j s_j = lse - sum_r w_r (lse_r - H_r) = sum_r w_r (H_r + lse - lse_r)

    of which the last is computed: it adds what is not negative, so that nothing cancels.

    Args:
        entropy, lse: float32 or float64 of one shape, for instance [R, B, Hq, M], what `attention_entropy` gave for
            each of R parts.
        dim: the dimension of the parts, which the result lacks.

    A row that sees no key of any part has entropy 0.

    >>> import math, torch
    >>> from tokenprune_kernels.distributed import merge_entropy
    >>> merge_entropy(torch.tensor([[0.0], [math.log(3.0)]]), torch.tensor([[1.0], [1.0 + math.log(3.0)]]))  # log 4
    tensor([1.3863])
    """
    behind = lse.logsumexp(dim, keepdim=True) - lse
    return torch.where(lse == -torch.inf, 0.0, (-behind).exp() * (entropy + behind)).sum(dim)
