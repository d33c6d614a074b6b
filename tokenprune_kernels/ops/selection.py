"""Selecting tokens from scores, always in ascending order of position, and the entropy of a score vector.

The order of candidates is the same everywhere: better value first, equal values (also -0.0 and 0.0) by lower index, NaN
after every number, infinities are ordinary numbers, tokens with a False mask are never selected.
"""

from torch import Tensor

from .. import _checks
from .._backend import implementation


def select_topk(
    scores: Tensor, k: int, *, mask: Tensor | None = None, largest: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k best tokens of each sample, in ascending order of position.

    Unlike torch.topk, the result is ready for gathering: ascending, with ties, NaN and masked tokens in a fixed order.

    Args:
        scores: [B, N], float16, bfloat16, float32 or float64.
        k: how many to keep, >= 0; may exceed N.
        mask: [B, N] bool, True for the tokens that may be selected; default all.
        largest: False selects the k smallest instead. NaN stays last.
        backend: `cuda`, `triton`, `cpu`, `reference` or `auto`; default: see `use_backend`.

    Returns:
        indices [B, k] int64, ascending, -1 after the last, and counts [B] int64 = min(k, number of True).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> scores = torch.tensor([[0.1, 0.9, 0.5, 0.9]])
    >>> tp.select_topk(scores, 2)
    (tensor([[1, 3]]), tensor([2]))
    >>> tp.select_topk(scores, 3, mask=torch.tensor([[True, False, False, True]]))
    (tensor([[ 0,  3, -1]]), tensor([2]))
    """
    _checks.select_topk(scores, k, mask)
    result: tuple[Tensor, Tensor] = implementation(backend, scores).select_topk(scores, k, mask=mask, largest=largest)
    return result


def select_two_tailed(
    scores: Tensor, num_low: Tensor, k: int, *, mask: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k - n highest tokens and the n lowest of what is left, n = clamp(num_low, 0, k).

    COAST keeps its context this way: tokens unlike the anchors next to tokens like them, in a proportion that follows
    from the entropy of the scores. `num_low` is a tensor, so that it never has to leave the device.

    Args:
        scores: [B, N], float16, bfloat16, float32 or float64.
        num_low: [B] int64, how many of the k go to the lowest scores; values outside [0, k] are clamped.
        k: how many to keep in all, >= 0; may exceed N.
        mask: [B, N] bool, True for the tokens that may be selected; default all.
        backend: `cuda`, `triton`, `cpu`, `reference` or `auto`; default: see `use_backend`.

    Returns:
        indices [B, k] int64, ascending, -1 after the last, and counts [B] int64 = min(k, number of True).
        NaN comes last at both ends.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.select_two_tailed(torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]]), torch.tensor([1]), 3)
    (tensor([[0, 1, 2]]), tensor([3]))
    """
    _checks.select_two_tailed(scores, num_low, k, mask)
    result: tuple[Tensor, Tensor] = implementation(backend, scores).select_two_tailed(scores, num_low, k, mask=mask)
    return result


def select_mixture(
    text_scores: Tensor,
    visual_scores: Tensor,
    k: int,
    *,
    floor: float = 0.25,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdaFV's adaptive mixture (arXiv 2501.09532): k places shared between a text-guided and a visual ranking.

    With b = floor(floor * k), the first b tokens of each ranking are reserved. Of the R = k - 2b places left, the text
    ranking gets r, the smallest r that maximises P_text(r) * P_visual(R - r), where P(r) is the sum of the r scores
    after the reserved ones. A token that both rankings keep counts once; the places this frees go to the tokens with
    the largest share of either list, max(s_text / sum s_text, s_visual / sum s_visual).

    Args:
        text_scores: [B, N], float16, bfloat16, float32 or float64; negative and NaN count as 0.
        visual_scores: [B, N], likewise; the two dtypes may differ.
        k: how many to keep, >= 0; may exceed N.
        floor: the part of k that each ranking is sure of, in [0, 0.5].
        mask: [B, N] bool, True for the tokens that may be selected; default all.
        backend: `cuda`, `triton`, `cpu`, `reference` or `auto`; default: see `use_backend`.

    Returns:
        indices [B, k] int64, ascending, -1 after the last; counts [B] int64 = min(k, number of True); and
        num_text [B] int64 = b + r, the places given to the text ranking.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    >>> import torch, tokenprune_kernels as tp
    >>> text = torch.tensor([[8.0, 0.0, 0.0, 0.0, 0.0, 0.0]])  # one token has all the mass: more would not add any
    >>> visual = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    >>> tp.select_mixture(text, visual, 4, floor=0.0)
    (tensor([[0, 1, 2, 3]]), tensor([4]), tensor([1]))
    """
    _checks.select_mixture(text_scores, visual_scores, k, floor, mask)
    result: tuple[Tensor, Tensor, Tensor] = implementation(backend, text_scores).select_mixture(
        text_scores, visual_scores, k, floor=floor, mask=mask
    )
    return result


def mask_to_indices(mask: Tensor, capacity: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Positions of True in ascending order, cut at `capacity`.

    A nonzero() whose result has a fixed shape, so that nothing waits for the device.

    Args:
        mask: [B, N] bool.
        capacity: length of the lists, >= 0; may exceed N.
        backend: `cuda`, `triton`, `cpu`, `reference` or `auto`; default: see `use_backend`.

    Returns:
        indices [B, capacity] int64, ascending, -1 after the last, and counts [B] int64 = min(number of True, capacity).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or value.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.mask_to_indices(torch.tensor([[True, False, True]]), 4)
    (tensor([[ 0,  2, -1, -1]]), tensor([2]))
    """
    _checks.mask_to_indices(mask, capacity)
    result: tuple[Tensor, Tensor] = implementation(backend, mask).mask_to_indices(mask, capacity)
    return result


def score_entropy(
    scores: Tensor, *, mask: Tensor | None = None, normalized: bool = True, backend: str | None = None
) -> Tensor:
    """Entropy of each sample's scores taken as a distribution, p = max(s, 0) / sum: how spread out attention is.

    Args:
        scores: [B, N], float16, bfloat16, float32 or float64; negative and NaN count as 0.
        mask: [B, N] bool, True for the n tokens that count; default all.
        normalized: divide by log(n) and clamp to [0, 1]; False gives H = -sum p log p in nats.
        backend: `cuda`, `triton`, `cpu`, `reference` or `auto`; default: see `use_backend`.

    Returns:
        [B] float32 (float64 for float64). All-zero scores count as uniform; at most one token gives 0; a score of
        +inf leaves no distribution and gives NaN.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.score_entropy(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 7.0, 0.0, 0.0]]))
    tensor([1., 0.])
    """
    _checks.score_entropy(scores, mask)
    result: Tensor = implementation(backend, scores).score_entropy(scores, mask=mask, normalized=normalized)
    return result
