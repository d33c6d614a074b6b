"""The fast half of the argument checks: one expression per op that gives the sizes of most good calls.

Going through a description costs several microseconds, as much as some kernels. So the description is compiled, once,
into an expression over the arguments; where that has no value, `_checks.check` looks again and finds the words.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._checks import MOST_ELEMENTS, MOST_WORK, Sizes, check
from ._op import Argument, AtLeast, Choice, Count, Number, Op, TensorKind

# Subclasses go through the description: sizes of fake tensors are symbolic, and comparing them would leave guards.
_PLAIN = frozenset({Tensor, Parameter})
# Of arguments that may have any value of their type; the dispatcher would take None for False.
_TYPES = {"bool": frozenset({bool}), "float?": frozenset({float, int, type(None)})}


def _tensor(a: Argument, kind: TensorKind, first: str | None, known: set[str]) -> str:
    t = a.name
    terms = [f"type({t}) in plain", f"not {t}.is_nested", f"0 < {t}.numel() < {MOST_ELEMENTS}"]
    terms.append(f"{t}.dtype is {first}.dtype" if kind.like else f"{t}.dtype in {t}_dtypes")
    if first is not None:
        terms.append(f"{t}.device == {first}.device")
    terms.append(f"len(s := {t}.shape) == {len(kind.shape)}")
    for d, letter in enumerate(kind.shape):
        # A letter is 0 as long as no tensor has named it: those that could may have been optional and absent.
        named = letter in known or letter.isdigit()
        terms.append(f"s[{d}] == {letter}" if named else f"s[{d}] == ({letter} := {letter} or s[{d}]) > 0")
    if a.required:
        known.update(kind.shape)
    condition = " and ".join(terms)
    return condition if a.required else f"({t} is None or {condition})"


def _accepted(choice: Choice) -> frozenset[str]:
    lengths = (1, 2, 3) if choice.joined else (1,)
    lists = (words for n in lengths for words in itertools.product(choice.words, repeat=n))
    return frozenset(filter(None, (*map("+".join, lists), choice.alone)))


@functools.cache
def acceptance(op: Op) -> Callable[..., Sizes | None]:
    """The sizes as a function of the arguments in the order of the schema; it may raise where one is bad."""
    names: dict[str, Any] = {"plain": _PLAIN}
    terms: list[str] = []
    known: set[str] = set()
    first = None
    for a in op.arguments:
        if isinstance(a.kind, TensorKind):
            names[f"{a.name}_dtypes"] = frozenset(a.kind.dtypes)
            terms.append(_tensor(a, a.kind, first, known))
            first = first or a.name
        elif isinstance(a.kind, Count):
            terms.append(f"type({a.name}) is int and 0 <= {a.name} * B < {MOST_ELEMENTS}")
        elif isinstance(a.kind, AtLeast):
            terms.append(f"type({a.name}) is int and {a.name} >= {a.kind.low}")
        elif isinstance(a.kind, Number):
            names |= {f"{a.name}_low": a.kind.low, f"{a.name}_high": a.kind.high}
            less = "<" if a.kind.above else "<="
            terms.append(f"type({a.name}) is float and {a.name}_low {less} {a.name} <= {a.name}_high")
        elif isinstance(a.kind, Choice):
            names[f"{a.name}_words"] = _accepted(a.kind)
            terms.append(f"{a.name} in {a.name}_words")
        elif a.type in _TYPES:
            names[f"{a.name}_types"] = _TYPES[a.type]
            terms.append(f"type({a.name}) in {a.name}_types")
    arguments = [a.name for a in op.arguments]
    sizes = ", ".join(f"'{size}': {size}" for size in op.sizes)
    if op.rule is not None:
        names["rule"] = op.rule.check
        terms.append(op.rule.expression or f"rule({op.name!r}, {{{sizes}}}, {', '.join(arguments)}) is None")
    if op.work is not None:
        terms.append(" * ".join(f"({factor} or 1)" for factor in op.work[1].split(" * ")) + f" < {MOST_WORK}")
    parameters = [*arguments, *(f"{size}=0" for size in op.sizes if size not in arguments)]
    source = f"lambda {', '.join(parameters)}: {{{sizes}}} if {' and '.join(terms)} else None"
    accepts: Callable[..., Sizes | None] = eval(source, names)
    return accepts


def good_sizes(op: Op, values: Sequence[Any]) -> Sizes | None:
    """The sizes where the arguments are certainly good, 0 for one that no tensor has; None says nothing.

    Under torch.compile always None: there it costs nothing at run time to go through the description."""
    if torch.compiler.is_compiling():
        return None
    try:
        return acceptance(op)(*values)
    except (TypeError, RuntimeError):  # a value without a hash, sizes whose product overflows
        return None


def checked_sizes(op: Op, values: Sequence[Any]) -> Sizes:
    """The sizes of good arguments; raises what `check` raises for others."""
    sizes = good_sizes(op, values)
    return check(op, values) if sizes is None else sizes
