"""Selecting tokens from scores, always in ascending order of position, and the entropy of a score vector."""

from torch import Tensor

from .. import _checks
from .._backend import implementation


def select_topk(
    scores: Tensor, k: int, *, mask: Tensor | None = None, largest: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k best tokens of each sample, in ascending order of position: (indices, counts)."""
    _checks.select_topk(scores, k, mask)
    result: tuple[Tensor, Tensor] = implementation(backend, scores).select_topk(scores, k, mask=mask, largest=largest)
    return result


def select_two_tailed(
    scores: Tensor, num_low: Tensor, k: int, *, mask: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k - n highest tokens and the n lowest of what is left, n = clamp(num_low, 0, k): (indices, counts)."""
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
    """AdaFV's adaptive mixture of two rankings: (indices, counts, num_text)."""
    _checks.select_mixture(text_scores, visual_scores, k, floor, mask)
    result: tuple[Tensor, Tensor, Tensor] = implementation(backend, text_scores).select_mixture(
        text_scores, visual_scores, k, floor=floor, mask=mask
    )
    return result


def mask_to_indices(mask: Tensor, capacity: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Positions of True in ascending order, cut at `capacity`: (indices, counts)."""
    _checks.mask_to_indices(mask, capacity)
    result: tuple[Tensor, Tensor] = implementation(backend, mask).mask_to_indices(mask, capacity)
    return result


def score_entropy(
    scores: Tensor, *, mask: Tensor | None = None, normalized: bool = True, backend: str | None = None
) -> Tensor:
    """Entropy of each sample's scores taken as a distribution: [B, N] -> [B]."""
    _checks.score_entropy(scores, mask)
    result: Tensor = implementation(backend, scores).score_entropy(scores, mask=mask, normalized=normalized)
    return result
