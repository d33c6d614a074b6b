"""The fast half of the argument checks: one expression per op that is True for most good calls.

Going through a description costs several microseconds, as much as some kernels. So the description is compiled, once,
into an expression over the arguments; where that is not True, `_checks.check` looks again and finds the words.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._op import Argument, AtLeast, Choice, Count, Number, Op, TensorKind


def _tensor(a: Argument, kind: TensorKind, first: str | None, known: set[str]) -> str:
    t = a.name
    terms = [f"isinstance({t}, Tensor)", f"not {t}.is_nested", f"0 < {t}.numel() < {1 << 40}"]
    terms.append(f"{t}.dtype is {first}.dtype" if kind.like else f"{t}.dtype in {t}_dtypes")
    if first is not None:
        terms.append(f"{t}.device == {first}.device")
    terms.append(f"len(s := {t}.shape) == {len(kind.shape)}")
    for d, letter in enumerate(kind.shape):
        if letter in known or letter.isdigit():
            terms.append(f"s[{d}] == {letter}")
        else:
            terms.append(f"(({letter} := s[{d}]) > 0)")
            if a.required:  # the size of an absent tensor is unknown
                known.add(letter)
    condition = " and ".join(terms)
    return condition if a.required else f"({t} is None or {condition})"


def _accepted(choice: Choice) -> frozenset[str]:
    lengths = (1, 2, 3) if choice.joined else (1,)
    return frozenset("+".join(words) for n in lengths for words in itertools.product(choice.words, repeat=n))


@functools.cache
def acceptance(op: Op) -> Callable[..., bool]:
    """The expression as a function of the arguments in the order of the schema; it may raise where one is bad."""
    names: dict[str, Any] = {"Tensor": Tensor}
    terms: list[str] = []
    known: set[str] = set()
    first = None
    for a in op.arguments:
        if isinstance(a.kind, TensorKind):
            names[f"{a.name}_dtypes"] = frozenset(a.kind.dtypes)
            terms.append(_tensor(a, a.kind, first, known))
            first = first or a.name
        elif isinstance(a.kind, Count):
            terms.append(f"type({a.name}) is int and 0 <= {a.name} * B < {1 << 40}")
        elif isinstance(a.kind, AtLeast):
            terms.append(f"type({a.name}) is int and {a.name} >= {a.kind.low}")
        elif isinstance(a.kind, Number):
            names |= {f"{a.name}_low": a.kind.low, f"{a.name}_high": a.kind.high}
            less = "<" if a.kind.above else "<="
            terms.append(f"type({a.name}) is float and {a.name}_low {less} {a.name} <= {a.name}_high")
        elif isinstance(a.kind, Choice):
            names[f"{a.name}_words"] = _accepted(a.kind)
            terms.append(f"{a.name} in {a.name}_words")
    arguments = ", ".join(a.name for a in op.arguments)
    if op.rule is not None:
        names["rule"] = op.rule.check
        terms.append(op.rule.expression or f"rule({op.name!r}, {{'B': B}}, {arguments}) is None")
    source = f"lambda {arguments}: {' and '.join(terms)}"
    accepts: Callable[..., bool] = eval(source, names)
    return accepts


def is_good(op: Op, values: tuple[Any, ...]) -> bool:
    """Are the arguments certainly good? False says nothing.

    Under torch.compile never: there it costs nothing at run time to go through the description."""
    if torch.compiler.is_compiling():
        return False
    try:
        return acceptance(op)(*values)
    except (TypeError, RuntimeError):  # a value without a hash, sizes whose product overflows
        return False
