"""Accuracies with confidence intervals. All methods answer the same questions, so differences are paired."""

from typing import NamedTuple

from scipy.stats import binomtest
from torch import Tensor

NORMAL = 1.959964  # half the width of a 95% interval, in standard errors


class Share(NamedTuple):
    """An accuracy and its 95% interval."""

    value: float
    low: float
    high: float


class Change(NamedTuple):
    """A difference of accuracies on the same questions; `half` is half of its 95% interval."""

    value: float
    half: float


def share(right: Tensor) -> Share:
    """Wilson's interval of one run over all its questions."""
    hits, asked = int(right.sum()), right.numel()
    interval = binomtest(hits, asked).proportion_ci(method="wilson")
    return Share(hits / asked, interval.low, interval.high)


def _mean(each: Tensor) -> Change:
    """The mean and its interval from one value per question; several runs (seeds) [R, N] are averaged first."""
    each = each.reshape(-1, each.shape[-1]).mean(0)
    return Change(each.mean().item(), NORMAL * (each.std(unbiased=True) / each.numel() ** 0.5).item())


def change(right: Tensor, reference: Tensor) -> Change:
    """Accuracy minus that of the reference; right answers are [N] or, of several runs (seeds), [R, N]."""
    return _mean(right.double() - reference.double())


def mean_share(right: Tensor) -> Share:
    """[R, N]: several runs (seeds) on the same questions; the interval is that of the questions' means."""
    if right.dim() == 1 or len(right) == 1:
        return share(right.reshape(-1))
    value, half = _mean(right.double())
    return Share(value, value - half, value + half)
