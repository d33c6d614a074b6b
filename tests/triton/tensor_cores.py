"""Triton's interpreter with products of 16-bit matrices as matrix units add them, instead of NumPy's sums.

A unit takes the products of a group of elements together with the accumulator, aligns them to the largest, cuts off
what lies below `extra` bits behind that one's last place, adds, and cuts the sum to float32. Published measurements of
GPUs find groups of 4, 8 and 16 and up to 3 extra bits; NumPy's sums round to nearest, and err less.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest


class Unit(NamedTuple):
    group: int
    extra: int


UNITS = tuple(Unit(group, extra) for group in (4, 8, 16) for extra in (0, 1, 2, 3))
# Small groups truncate most often. Without extra bits every product loses some: worst for products of one sign. With
# them it is the sum that does, in every step and towards zero: worst for sums of both signs, small for their terms.
WORST = (Unit(group=4, extra=0), Unit(group=4, extra=3))
BITS = 24  # of a float32


def exponents(x: Any) -> Any:
    """e with 2^(e - 1) <= |x| < 2^e; far below all others where x is 0."""
    return np.where(x == 0, -1000, np.frexp(x)[1])


def cut(x: Any, exponent: Any, bits: int) -> Any:
    """x without what lies below the `bits` highest bits of a number with this exponent, towards zero."""
    lowest_bit = exponent - bits
    return np.ldexp(np.trunc(np.ldexp(x, -lowest_bit)), lowest_bit)


def multiply(a: Any, b: Any, total: Any, unit: Unit) -> Any:
    """total + a @ b for finite 16-bit a and b; float64 holds every sum of cut products exactly."""
    a, b, total = (x.astype(np.float64) for x in (a, b, total))
    for k in range(0, a.shape[1], unit.group):
        products = a[:, k : k + unit.group, None] * b[None, k : k + unit.group]
        terms = np.concatenate([total[:, None], products], 1)
        largest = exponents(terms).max(1)
        total = cut(terms, largest[:, None], BITS + unit.extra).sum(1)
        total = cut(total, exponents(total), BITS)
    return total.astype(np.float32)


@contextmanager
def interpreted_on(unit: Unit | None) -> Iterator[None]:
    """Inside, interpreted kernels multiply as `unit` does; None is what the interpreter does by itself."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    nearest = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        plain = nearest(self, a, b, d, *options)
        if unit is None or a.data.dtype != np.float16:  # float32 is multiplied by the ordinary units
            return plain
        with np.errstate(invalid="ignore", over="ignore"):  # of elements that are not finite: they stay as they are
            truncated = multiply(a.data, b.data, d.data, unit)
        return TensorHandle(np.where(np.isfinite(plain.data), truncated, plain.data), d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield
