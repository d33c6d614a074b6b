"""What `keep` says: how many visual tokens stay, from which decoder layer on."""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

Share = int | float
Budget = Callable[[int], int]  # of so many visual tokens in the prompt, how many stay


def as_python(number: Any) -> Any:
    """The scalars of NumPy and torch as Python's numbers; anything else as it is."""
    return number.item() if getattr(number, "shape", None) == () else number


def budget_of(keep: Share, rounding: Callable[[Fraction], int] = round) -> Budget:
    """How many of a sample's visual tokens stay: a count, or a ratio of what there is, rounded, at least one."""
    keep = as_python(keep)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"prune_visual_tokens: keep must be an int (tokens) or a float (ratio), got {keep!r}")
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"prune_visual_tokens: keep must be at least 1 token, got {keep}")
        return lambda tokens: min(keep, tokens)
    if not 0 < keep <= 1:
        raise ValueError(f"prune_visual_tokens: a ratio to keep must lie in (0, 1], got {keep}")
    ratio = Fraction(str(keep))  # as it was written: 0.29 of 100 tokens are 29
    return lambda tokens: min(tokens, max(1, rounding(ratio * tokens)))


def schedule_of(keep: Mapping[int, Share], depth: int) -> dict[int, Budget]:
    """The budget from each decoder layer on, of a decoder with `depth` layers; shares are rounded down."""
    if not keep:
        raise ValueError("prune_visual_tokens: a schedule to keep names a layer at least, got {}")
    schedule: dict[int, Budget] = {}
    before: dict[type, Share] = {}  # tokens and shares cannot be compared here: what is left bounds both
    for layer, share in keep.items():
        layer, share = check_layer(layer, depth), as_python(share)
        if schedule and layer <= max(schedule):
            raise ValueError(f"prune_visual_tokens: the layers of keep must ascend, got {list(keep)}")
        schedule[layer] = budget_of(share, math.floor)
        if share > before.get(type(share), share):
            raise ValueError(
                f"prune_visual_tokens: keep must not grow from layer to layer, got {share} in front of layer {layer} "
                f"behind {before[type(share)]}"
            )
        before[type(share)] = share
    return schedule


def check_layer(layer: Any, depth: int) -> int:
    """A decoder layer in front of which tokens can be dropped."""
    layer = as_python(layer)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < depth:
        raise ValueError(f"prune_visual_tokens: layer must lie in [1, {depth - 1}] for this model, got {layer!r}")
    return layer


def times(share: Share | Fraction, budget: Budget) -> Budget:
    """So many times the budget, rounded down."""
    return lambda tokens: min(tokens, int(share * budget(tokens)))


def ending_with(budget: Budget, shares: Mapping[int, float]) -> dict[int, Budget]:
    """A schedule in the proportions of `shares`, whose last layer keeps the budget."""
    *_, last = shares.values()
    return {layer: times(Fraction(str(share)) / Fraction(str(last)), budget) for layer, share in shares.items()}
