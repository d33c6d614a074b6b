"""What `keep` says: how many visual tokens of every sample or image stay, from which decoder layer on.

One number holds for all of them, a list has one for each. A budget is the one description of it: the prefill asks it
how many stay of the visual tokens that the samples or images of its call have.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

from torch import Tensor

from ..._convert import as_python, share_of

Share = int | float
Keep = Share | Sequence[Share] | Tensor


class Budget(Protocol):
    """Of so many visual tokens in each sample or image of a call, how many stay. further: how many other tokens the
    prompt of each has, which some budgets have to know (targets.py)."""

    def __call__(self, tokens: Sequence[int], further: Sequence[int] = ..., /) -> list[int]: ...


def numbers_of(keep: Any, per: str | None = None) -> list[Share]:
    """All numbers that `keep` has. A list needs to be said what each of its numbers is for."""
    listed = as_python(keep)
    if not isinstance(listed, (list, tuple)):
        return [_number(listed, keep)]
    if per is None:
        raise TypeError(
            "prune_visual_tokens: a list to keep has an int (tokens) or a float (share) per sample or per image of the "
            f"call, and per= must be 'sample' or 'image' to say which, got {keep!r} without it"
        )
    if not listed:
        raise ValueError(f"prune_visual_tokens: a list to keep has a number per {per}, got {keep!r}")
    return [_number(as_python(number), keep) for number in listed]


def _number(number: Any, keep: Any) -> Share:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"prune_visual_tokens: keep must be an int (tokens) or a float (ratio), got {keep!r}")
    if isinstance(number, int) and number < 1:
        raise ValueError(f"prune_visual_tokens: keep must be at least 1 token, got {number}")
    if not isinstance(number, int) and not 0 < number <= 1:
        raise ValueError(f"prune_visual_tokens: a ratio to keep must lie in (0, 1], got {number}")
    return number


def budget_of(
    keep: Keep, per: str | None = None, *, least: int = 1, rounding: Callable[[Fraction], int] = round
) -> Budget:
    """Counts of tokens, or ratios of what there is, rounded, `least` at least and never more than there is."""
    numbers = numbers_of(keep, per)
    one_for_all = not isinstance(as_python(keep), (list, tuple))

    def budget(tokens: Sequence[int], further: Sequence[int] = ()) -> list[int]:
        if not one_for_all and len(numbers) != len(tokens):
            raise ValueError(
                f"prune_visual_tokens: keep must have a number per {per} of the call, {len(tokens)}, got {numbers}"
            )
        due = numbers * len(tokens) if one_for_all else numbers
        return [_kept(number, there, least, rounding) for number, there in zip(due, tokens, strict=True)]

    return budget


def _kept(number: Share, tokens: int, least: int, rounding: Callable[[Fraction], int]) -> int:
    if isinstance(number, int):
        return min(number, tokens)
    return share_of(number, tokens, least=least, rounding=rounding)


def schedule_of(keep: Mapping[int, Keep], depth: int, per: str | None = None, *, least: int = 1) -> dict[int, Budget]:
    """The budget from each decoder layer on, of a decoder with `depth` layers; shares are rounded down."""
    if not keep:
        raise ValueError("prune_visual_tokens: a schedule to keep names a layer at least, got {}")
    schedule: dict[int, Budget] = {}
    # What each number follows. Tokens and shares cannot be compared here: what is left bounds both.
    before: list[dict[type, Share]] = []
    for layer, at_layer in keep.items():
        layer, numbers = check_layer(layer, depth), numbers_of(at_layer, per)
        if schedule and layer <= max(schedule):
            raise ValueError(f"prune_visual_tokens: the layers of keep must ascend, got {list(keep)}")
        schedule[layer] = budget_of(at_layer, per, least=least, rounding=math.floor)
        before = before or [{} for _ in numbers]
        if len(before) != len(numbers):
            raise ValueError(f"prune_visual_tokens: keep must have as many numbers at every layer, got {dict(keep)}")
        for number, last in zip(numbers, before, strict=True):
            if number > last.get(type(number), number):
                raise ValueError(
                    f"prune_visual_tokens: keep must not grow from layer to layer, got {number} in front of layer "
                    f"{layer} behind {last[type(number)]}"
                )
            last[type(number)] = number
    return schedule


def least_of(min_keep: Any, keep: Any, per: str | None) -> int:
    """What a share keeps at least; keep: what it bounds, which must have a share then."""
    if min_keep is None:
        return 1
    least = as_python(min_keep)
    if isinstance(least, bool) or not isinstance(least, int):
        raise TypeError(f"prune_visual_tokens: min_keep must be an int (tokens) or None, got {min_keep!r}")
    if least < 1:
        raise ValueError(f"prune_visual_tokens: min_keep must be at least 1 token, got {least}")
    of_layers = list(keep.values()) if isinstance(keep, Mapping) else [keep]
    if not any(isinstance(number, float) for each in of_layers for number in numbers_of(each, per)):
        raise ValueError(
            f"prune_visual_tokens: min_keep is the least that a share keeps, and keep must have one, got {keep!r}"
        )
    return least


def check_layer(layer: Any, depth: int) -> int:
    """A decoder layer in front of which tokens can be dropped."""
    layer = as_python(layer)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < depth:
        raise ValueError(f"prune_visual_tokens: layer must lie in [1, {depth - 1}] for this model, got {layer!r}")
    return layer


def times(share: Share | Fraction, budget: Budget) -> Budget:
    """So many times the budget, rounded down."""

    def several(tokens: Sequence[int], further: Sequence[int] = ()) -> list[int]:
        return [min(n, int(share * kept)) for n, kept in zip(tokens, budget(tokens, further), strict=True)]

    return several


def ending_with(budget: Budget, shares: Mapping[int, float]) -> dict[int, Budget]:
    """A schedule in the proportions of `shares`, whose last layer keeps the budget."""
    *_, last = shares.values()
    return {layer: times(Fraction(str(share)) / Fraction(str(last)), budget) for layer, share in shares.items()}
