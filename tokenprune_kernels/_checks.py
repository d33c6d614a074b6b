"""The argument checks of every op: they name the op, the argument, what was expected and what was received.

They follow from the op's description (_op.py). The Python functions raise what these raise (ValueError, TypeError); the
fakes and the fallback ops turn it into the RuntimeError that torch.ops promises. The compiled ops check the same in C++
(csrc/generated/ops.h), with the same sentences.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _advice
from ._op import FLOATS, OPS, Argument, AtLeast, Choice, Count, Number, Op, TensorKind

QUANTIZED = frozenset(
    getattr(torch, name) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4") if hasattr(torch, name)
)
# Stride 0 makes dimensions of any size, which no loop gets through. No argument may have more elements than this, which
# is beyond every memory, and no call needs that many multiplications.
MOST_ELEMENTS, _MOST = 1 << 40, "2^40"
MOST_WORK, _MOST_WORK = 1 << 56, "2^56"
_is_compiling = torch.compiler.is_compiling

Sizes = dict[str, Any]  # by letter


def complain(
    error: type[Exception], who: str, argument: str, expected: str, got: object, instead: str = ""
) -> NoReturn:
    """What was expected, what was received, and, where that can be said, what to type instead."""
    raise error(f"{who}: {argument} must {expected}, got {got}{instead and f'; {instead}'}")


def fail(error: type[Exception], op: str, argument: str, expected: str, got: object, instead: str = "") -> NoReturn:
    complain(error, f"tokenprune::{op}", argument, expected, got, instead)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(t: Tensor) -> str:
    return str(list(t.shape))


def _what_else(value: object) -> str:
    return "None" if value is None else type(value).__name__


def check(op: Op, values: Sequence[Any]) -> Sizes:
    """Check all arguments, given in the order of the schema; the sizes that the letters of their shapes stand for."""
    sizes: Sizes = {}
    first = None
    for argument, value in zip(op.arguments, values, strict=True):
        kind = argument.kind
        if isinstance(kind, TensorKind):
            if value is None and not argument.required:
                continue
            check_tensor(f"tokenprune::{op.name}", argument, kind, value, sizes, first)
            first = value if first is None else first
        elif isinstance(kind, Count):
            expected = "be an int, a share of the tokens (a float) or a list of one per sample"
            check_count(f"tokenprune::{op.name}", argument.name, value, expected)
            sizes[argument.name] = value
        elif isinstance(kind, AtLeast):
            _at_least(op.name, argument.name, kind, value)
        elif isinstance(kind, Number):
            _number(op.name, argument.name, kind, value)
        elif isinstance(kind, Choice):
            _choice(op.name, argument.name, kind, value)
        elif argument.type == "bool":
            if not isinstance(value, (bool, torch.SymBool)):
                fail(TypeError, op.name, argument.name, "be True or False", repr(value))
        elif argument.type == "float?" and isinstance(value, (bool, str, list, tuple)):
            fail(TypeError, op.name, argument.name, "be a number or None", repr(value))
    if op.rule is not None:
        op.rule.check(op.name, sizes, *values)
    _check_bounds(op, sizes, values)
    _check_work(op, sizes)
    return sizes


def check_tensor(who: str, a: Argument, kind: TensorKind, t: Any, sizes: Sizes, first: Tensor | None) -> None:
    """sizes: what letters stand for so far; those of `t` are added. first: the first tensor of the call, or None."""
    if not isinstance(t, Tensor):
        expected = "be a tensor" if a.required else "be a tensor or None"
        complain(TypeError, who, a.name, expected, _what_else(t), _advice.of_value(a.name, t))
    if t.is_nested:  # it has no shape to look at; other layouts are left to the dispatcher and to `on_dense`
        refuse_not_dense(who, a.name, t)
    if kind.dtypes and t.dtype not in kind.dtypes:
        wanted = None if kind.dtypes is FLOATS else kind.dtypes[0]
        expected = "float16, bfloat16, float32 or float64" if wanted is None else dtype_name(wanted)
        complain(TypeError, who, a.name, f"be {expected}", dtype_name(t.dtype), _advice.of_dtype(a.name, wanted, t))
    if kind.like and first is not None and t.dtype != first.dtype:
        expected = f"have the dtype of {kind.like} ({dtype_name(first.dtype)})"
        complain(TypeError, who, a.name, expected, dtype_name(t.dtype), f"type {a.name}.to({kind.like}.dtype)")
    shape = t.shape
    known = [sizes.get(letter, int(letter) if letter.isdigit() else -1) for letter in kind.shape]
    fits = len(shape) == len(known)
    for want, size in zip(known, shape, strict=False):  # any() over a generator takes twice as long, in every call
        fits = fits and (want == -1 or want == size)
    if not fits:
        numbers = ", ".join("any" if size == -1 else str(size) for size in known)
        expected = f"have shape {kind.text}" + ("" if first is None else f" = [{numbers}]")
        complain(ValueError, who, a.name, expected, shape_text(t), _advice.of_shape(a.name, known, t, first is None))
    if first is not None and t.device != first.device:
        complain(ValueError, who, a.name, f"be on {first.device}", t.device, f"type {a.name}.to('{first.device}')")
    sizes.update(zip(kind.shape, shape, strict=True))


def check_count(who: str, name: str, value: Any, expected: str = "be an int") -> int:
    """A number that is known to the host and not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        complain(TypeError, who, name, expected, _what_else(value))
    if value < 0:
        complain(ValueError, who, name, "be non-negative", value)
    return value  # type: ignore[return-value]  # a SymInt is as good


def _at_least(op: str, name: str, kind: AtLeast, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(TypeError, op, name, "be an int", _what_else(value))
    if value < kind.low:
        fail(ValueError, op, name, f"be >= {kind.low}", value)


def _number(op: str, name: str, kind: Number, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        instead = f"type {name}.item(), which waits for the device" if isinstance(value, Tensor) else ""
        fail(TypeError, op, name, "be a number", _what_else(value), instead)
    if not ((value > kind.low if kind.above else value >= kind.low) and value <= kind.high):
        expected = f"be {'>' if kind.above else '>='} {kind.low:g} and <= {kind.high:g}"
        fail(ValueError, op, name, expected, f"{value:g}")


def _choice(op: str, name: str, kind: Choice, value: str) -> None:
    if not isinstance(value, str):
        fail(TypeError, op, name, "be a string", _what_else(value))
    words = value.split("+") if kind.joined else (value,)
    if not (all(word in kind.words for word in words) or (kind.alone and value == kind.alone)):
        fail(ValueError, op, name, kind.text, f"'{value}'")


def _check_bounds(op: Op, sizes: Sizes, values: Sequence[Any]) -> None:
    """No tensor has 2^40 elements, nor are that many results asked for.

    A size of 0 counts as 1: it ends no loop over the other dimensions. What is symbolic passes without leaving a guard;
    the op checks the real sizes when it runs.
    """
    for argument, value in zip(op.arguments, values, strict=True):
        if isinstance(value, Tensor):
            if not is_bounded(value):
                refuse_size(op.name, argument.name, value)
        elif isinstance(argument.kind, Count):
            batch = sizes["B"]
            if type(value) is int and type(batch) is int and value * max(batch, 1) >= MOST_ELEMENTS:
                expected = f"keep B * {argument.name} below {_MOST}"
                fail(ValueError, op.name, argument.name, expected, [batch, value])


@functools.cache
def _factors(op: Op) -> Callable[..., list[int]]:
    """The factors of an op's work as a function of its sizes by name."""
    assert op.work is not None
    factors: Callable[..., list[int]] = eval(f"lambda {', '.join(op.sizes)}: [{op.work[1].replace(' * ', ', ')}]")
    return factors


def _check_work(op: Op, sizes: Sizes) -> None:
    """The sizes of several arguments together: a size of 0 counts as 1 here too, and symbolic ones pass."""
    if op.work is None or _is_compiling() or any(type(size) is not int for size in sizes.values()):
        return
    factors = _factors(op)(*(sizes.get(name, -1) for name in op.sizes))  # -1: of a tensor that is absent
    if math.prod(factor for factor in factors if factor > 0) >= MOST_WORK:
        blamed, product = op.work
        fail(ValueError, op.name, blamed, f"keep {product} below {_MOST_WORK}", factors)


def is_bounded(t: Tensor) -> bool:
    if _is_compiling():
        return True
    try:
        elements = t.numel()
    except RuntimeError:  # the product overflows
        elements = 0
    if type(elements) is not int or 0 < elements < MOST_ELEMENTS:
        return True
    return math.prod(filter(None, t.shape)) < MOST_ELEMENTS


def refuse_size(op: str, name: str, t: Tensor) -> NoReturn:
    fail(ValueError, op, name, f"have fewer than {_MOST} elements (a size of 0 counts as 1)", shape_text(t))


def refuse_not_dense(who: str, name: str, t: Tensor) -> None:
    quantized = t.dtype in QUANTIZED  # under vmap is_quantized is False, and torch ends the process
    if t.layout != torch.strided or t.is_nested or quantized:
        got = "a nested one" if t.is_nested else "a quantized one" if quantized else f"one of {t.layout}"
        complain(TypeError, who, name, "be a dense tensor", got, _advice.of_layout(name, t))
    # The dispatcher makes zeros in memory out of a tensor without any, unless the caller has turned that off.
    if t._is_zerotensor() and torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ZeroTensor):
        complain(TypeError, who, name, "have memory", "a tensor without")


def on_dense(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, given dense tensors only.

    The dispatcher sees to it for compiled kernels. What is not compiled serves everything else, and has to look.
    """
    who, names = f"tokenprune::{op}", tuple(a.name for a in OPS[op].arguments)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                if isinstance(value, Tensor):
                    refuse_not_dense(who, name, value)
                elif isinstance(value, (list, tuple)):
                    for i, t in enumerate(value):
                        if isinstance(t, Tensor):
                            refuse_not_dense(who, f"{name}[{i}]", t)
        return function(*args, **kwargs)

    return run
