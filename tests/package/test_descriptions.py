"""What follows from a description, on ops made up for it that reach what no op of the package does (yet)."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.generate_ops import check_function
from tokenprune_kernels._accept import checked_sizes, good_sizes
from tokenprune_kernels._checks import check
from tokenprune_kernels._op import OPS, Op, flags, floats, integers, op, scores


def described(function: Callable[..., Any], **description: Any) -> Op:
    """The description alone: the op is not among those of the package."""
    op(**description)(function)
    return OPS.pop(function.__name__)


def made_up(values: Tensor, *, first: Tensor | None = None, second: Tensor | None = None) -> Tensor:
    raise NotImplementedError


def late(values: Tensor, *, first: Tensor | None = None, last: Tensor) -> Tensor:
    raise NotImplementedError


# Q is a size that only optional tensors have, or that the first to have it is optional.
SHARED = described(
    made_up,
    values=floats("B N"),
    first=flags("B Q"),
    second=integers("B Q"),
    returns=scores("B"),
    work=("values", "N * Q"),
)
LATE = described(late, values=floats("B N"), first=flags("B Q"), last=integers("B Q"), returns=scores("B"))


def values_of(q_first: int | None, q_second: int | None) -> Sequence[Any]:
    first = None if q_first is None else torch.ones(2, q_first, dtype=torch.bool)
    second = None if q_second is None else torch.ones(2, q_second, dtype=torch.int64)
    return torch.ones(2, 3), first, second


@pytest.mark.parametrize("sizes", [(4, None), (None, 5), (5, 5), (None, None)])
def test_a_size_of_optional_tensors_is_that_of_whichever_is_there(sizes: tuple[int | None, int | None]) -> None:
    values = values_of(*sizes)
    found = good_sizes(SHARED, values)
    assert found == {"B": 2, "N": 3, "Q": sizes[0] or sizes[1] or 0}
    assert check(SHARED, values).items() <= found.items()


@pytest.mark.parametrize("described", [SHARED, LATE], ids=["made_up", "late"])
@pytest.mark.parametrize("sizes", [(4, 5), (0, 5), (5, 0)])
def test_optional_tensors_have_to_agree_on_a_size_of_theirs(described: Op, sizes: tuple[int, int]) -> None:
    values = values_of(*sizes)
    assert good_sizes(described, values) is None
    wrong = described.arguments[2].name
    expected = (
        rf"tokenprune::{described.name}: {wrong} must have shape \[B, Q\] = \[2, {sizes[0]}\], got \[2, {sizes[1]}\]"
    )
    with pytest.raises(ValueError, match=expected):
        checked_sizes(described, values)


def test_cpp_remembers_the_size_of_an_optional_tensor_and_leaves_that_of_an_absent_one_free() -> None:
    lines = [line.strip() for line in check_function(SHARED).splitlines()]
    start = lines.index("[[maybe_unused]] int64_t Q = first ? first->size(1) : -1;")
    assert lines[start - 1 : start + 4] == [
        'check_beside(op, "first", first, values, "[B, Q]", {B, -1}, ScalarType::Bool);',
        "[[maybe_unused]] int64_t Q = first ? first->size(1) : -1;",
        'check_beside(op, "second", second, values, "[B, Q]", {B, Q}, ScalarType::Long);',
        "Q = second ? second->size(1) : Q;",
        'check_work(op, "values", "N * Q", {N, Q});',
    ]
    assert "Q = last.size(1);" in check_function(LATE)


def test_work_without_an_optional_tensor_is_that_of_the_others() -> None:
    far = torch.zeros(1).expand(1, 1 << 39)
    many = torch.zeros(1, dtype=torch.bool).expand(1, 1 << 17)
    assert check(SHARED, (far, many[:, :-1], None))["N"] == 1 << 39
    assert check(SHARED, (far, None, None)) == {"B": 1, "N": 1 << 39}
    assert good_sizes(SHARED, (far, many, None)) is None
    expected = rf"made_up: values must keep N \* Q below 2\^56, got \[{1 << 39}, {1 << 17}\]"
    with pytest.raises(ValueError, match=expected):
        checked_sizes(SHARED, (far, many, None))
