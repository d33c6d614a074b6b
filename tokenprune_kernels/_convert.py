"""What callers may write for what an op takes, and how it becomes that.

Only the Python functions and the methods take it, and only where the fast check says no, so that a call as the ops take
it costs nothing more.
"""

import numbers
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ._advice import INTEGERS
from ._checks import complain
from ._op import FLOATS, INDEX_DTYPES, AtLeast, Count, Op, TensorKind


def converted(op: Op, values: Sequence[Any]) -> list[Any]:
    """The arguments in the order of the schema; what is wrong is left to the check. A budget may be a list of ints."""
    batch = next((v.shape[0] for v in values if isinstance(v, Tensor) and not v.is_nested and v.dim()), None)
    made = list(values)
    for i, (a, value) in enumerate(zip(op.arguments, values, strict=True)):
        if isinstance(a.kind, TensorKind):
            if isinstance(value, Tensor) and not value.is_nested:
                made[i] = as_kind(a.kind, value, batch)
        elif isinstance(a.kind, Count):
            made[i] = budget(f"tokenprune::{op.name}", a.name, value, _tokens(op, values), batch)
        elif isinstance(a.kind, AtLeast):
            made[i] = as_integer(value)
        elif a.type.startswith("float") and not isinstance(value, (int, float)) and isinstance(value, numbers.Real):
            made[i] = float(value)
        elif a.type == "bool" and (isinstance(value, int) or type(value).__name__ in ("bool", "bool_")):  # or NumPy's
            made[i] = bool(value)
    return made


def as_kind(kind: TensorKind, t: Tensor, batch: int | None) -> Tensor:
    """Narrow integers as int64, and positions as floats, of every sample where they are of all alike."""
    if torch.int64 in kind.dtypes and t.dtype in INDEX_DTYPES:
        return t.long()
    if kind.coordinates:
        if t.dtype in INTEGERS:
            t = t.float()
        if batch is not None and t.dim() == len(kind.shape) - 1:
            t = t.expand(batch, *t.shape)
    return t


def as_integer(value: Any) -> Any:
    """NumPy's integers as Python's."""
    if isinstance(value, (int, torch.SymInt)) or not isinstance(value, numbers.Integral):
        return value
    return int(value)


def _tokens(op: Op, values: Sequence[Any]) -> int | None:
    """N of the call."""
    for a, value in zip(op.arguments, values, strict=True):
        if isinstance(a.kind, TensorKind) and "N" in a.kind.shape and isinstance(value, Tensor) and not value.is_nested:
            return value.shape[a.kind.shape.index("N")] if value.dim() == len(a.kind.shape) else None
    return None


def share_of(share: float, tokens: int, *, least: int = 1, rounding: Callable[[Fraction], int] = round) -> int:
    """So much of the tokens, rounded, `least` at least and never more than there are: 0.29 of 100 is 29, as written."""
    return min(tokens, max(least, rounding(Fraction(str(share)) * tokens)))


# torch.compile takes the result for a constant: Fraction cannot be traced.
share_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_python(number: Any) -> Any:
    """The scalars of NumPy and torch as Python's numbers, their vectors as lists; anything else as it is."""
    return number.tolist() if len(getattr(number, "shape", (1, 1))) < 2 else number


def budget(who: str, name: str, given: Any, tokens: int | None, batch: int | None) -> Any:
    """`given` as an int, or as a list of ints that differ, one per sample; what is neither is left to the check."""
    if isinstance(given, (int, torch.SymInt)):
        return given
    if isinstance(given, float):
        return _number(who, name, given, tokens)
    if isinstance(given, Tensor) and given.device.type != "cpu":
        instead = f"type {name}.tolist(), which waits for the device, or give select_topk these numbers as budgets="
        complain(TypeError, who, name, "be known to the host", f"a tensor on {given.device}", instead)
    given = as_python(given)
    if not isinstance(given, (list, tuple)):
        return _number(who, name, given, tokens)
    if batch is not None and len(given) != batch:
        complain(ValueError, who, name, f"have one number per sample (B = {batch})", len(given))
    kept = [_number(who, name, as_python(number), tokens) for number in given]
    for number in kept:
        if isinstance(number, bool) or not isinstance(number, int):
            complain(TypeError, who, name, "have an int or a share (a float) per sample", type(number).__name__)
        if number < 0:
            complain(ValueError, who, name, "be non-negative", number)
    return kept if len(set(kept)) > 1 else kept[0] if kept else 0


def _number(who: str, name: str, number: Any, tokens: int | None) -> Any:
    if not isinstance(number, float) or tokens is None:
        return as_integer(number)
    if not 0 < number <= 1:
        instead = f"type {name}={number:.0f} for a number of tokens" if number > 1 and number.is_integer() else ""
        complain(ValueError, who, name, "lie in (0, 1] where it is a float, a share of the tokens", number, instead)
    return share_of(number, tokens) + 0  # a sum, because torch.compile cannot look into a constant any more


def samples_of(t: Tensor, samples: Sequence[int]) -> Tensor:
    """These samples of a tensor; an index list in brackets would wait for its device."""
    return t.index_select(0, torch.tensor(samples).to(t.device, non_blocking=True))


def by_budget(numbers: Sequence[int], run: Callable[[int, list[int]], Any]) -> Any:
    """run(k, samples) for the samples of every k, put together in the order of the batch.

    Lists that are shorter than the longest end in -1, values in 0.
    """
    samples: dict[int, list[int]] = {}
    for b, k in enumerate(numbers):
        samples.setdefault(k, []).append(b)
    order = [b for of_k in samples.values() for b in of_k]
    back = sorted(range(len(order)), key=order.__getitem__)
    return _joined([run(k, of_k) for k, of_k in samples.items()], back)


def _joined(parts: Sequence[Any], order: list[int]) -> Any:
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        return samples_of(torch.cat([_padded(part, shape) for part in parts]), order)
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts], order) for name in first}
    values = [_joined(each, order) for each in zip(*parts, strict=True)]
    return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)


def _padded(t: Tensor, shape: list[int]) -> Tensor:
    """[B, *shape]."""
    if list(t.shape[1:]) == shape:
        return t
    filler = 0 if t.dtype in FLOATS or t.dtype is torch.bool else -1
    padded = t.new_full((t.shape[0], *shape), filler)
    where = (slice(None), *map(slice, t.shape[1:]))
    padded[where] = t
    return padded
