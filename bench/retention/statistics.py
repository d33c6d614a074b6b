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


def change(right: Tensor, reference: Tensor) -> Change:
    """Accuracy minus that of the reference; [R, N] or [N] right answers, several runs (seeds) are averaged first."""
    each = right.double().reshape(-1, right.shape[-1]).mean(0) - reference.double()
    error = each.std(unbiased=True) / each.numel() ** 0.5
    return Change(each.mean().item(), NORMAL * error.item())


def mean_share(right: Tensor) -> Share:
    """[R, N]: several runs (seeds) on the same questions; the interval is that of the questions' means."""
    if right.dim() == 1 or len(right) == 1:
        return share(right.reshape(-1))
    each = right.double().mean(0)
    half = NORMAL * (each.std(unbiased=True) / each.numel() ** 0.5).item()
    return Share(each.mean().item(), each.mean().item() - half, each.mean().item() + half)
