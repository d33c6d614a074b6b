"""What a method tells of its choice, for every visual token of the prompt: its scores, and when each was picked."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...methods import Selection

ORDER = "order"  # among the details of a Selection: [R, K], the tokens in order of selection, -1 after the last
RANK = "rank"  # what becomes of it


class Told(NamedTuple):
    """What one call of a method's function told of R samples or images.

    details: its scores [R, V] and its order [R, K]. origin [R, V]: which visual token of the prompt each of a row's
    tokens is, -1: padding. sample: which one each row is of.
    """

    details: Mapping[str, Tensor]
    origin: Tensor
    sample: Sequence[int]


def told_by(result: Any, k: int, origin: Tensor, sample: Sequence[int]) -> list[Told]:
    """At most one. Scores are the details that have a number for every token; where all tokens stay, none are asked
    for, and what has a number for every pick could not be told from them."""
    if not isinstance(result, Selection) or k == origin.shape[1]:
        return []
    rows = len(sample)
    scores = {n: t for n, t in result.details.items() if t.is_floating_point() and t.shape == (rows, origin.shape[1])}
    order = result.details.get(ORDER)
    if order is not None and order.dim() == 2 and len(order) == rows:
        scores[ORDER] = order
    return [Told(scores, origin, sample)]


def by_token(told: Sequence[Told], counts: Sequence[int]) -> dict[str, Tensor]:
    """[B, V] on the host of each of the details, V the largest count: scores in float32, NaN where there is none;
    `rank` int64, the place of a token in the order of selection, from 0 on, -1 for what was not picked."""
    shape = (len(counts), max(counts, default=0))
    found: dict[str, Tensor] = {}
    for details, origin, sample in told:
        of_sample = torch.tensor(sample).unsqueeze(1)
        origin = origin.cpu()
        for name, value in details.items():
            values, at = value.cpu(), origin
            if name == ORDER:
                name, at = RANK, torch.where(values >= 0, origin.gather(1, values.clamp_min(0)), -1)
                values = torch.arange(values.shape[1]).expand_as(values)
            row, column = torch.broadcast_tensors(of_sample, at)
            there = at >= 0
            kind, empty = (torch.int64, -1) if name == RANK else (torch.float32, torch.nan)
            found.setdefault(name, torch.full(shape, empty, dtype=kind))[row[there], column[there]] = values[there].to(
                kind
            )
    return found
