"""The Triton kernels of gather_compact and _invert_indices: how tensors are seen, the table, launches, wide vectors."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing import gpu_backend
from testing.cases import NO_TRITON
from tokenprune_kernels import _triton

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
INDICES = torch.tensor([[0, 2, 3, -1], [4, 1, -1, -1]])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from tokenprune_kernels.triton import runtime

    seen: list[Any] = []
    monkeypatch.setattr(runtime, "recorder", lambda *launch: seen.append(launch))
    return seen


def gather(tensors: list[Tensor], indices: Tensor, dims: list[int], batch_dims: list[int] | None = None):
    kept = tp.gather_compact(tensors, indices, dims=dims, batch_dims=batch_dims, backend="triton")
    want = tp.reference.gather_compact(tensors, indices, dims=dims, batch_dims=batch_dims)
    assert all(torch.equal(k, w) for k, w in zip(kept, want, strict=True))
    return kept


def decoded(numbers: tuple[int, ...]) -> list[int]:
    return [number - 2**62 >> 1 for number in numbers]


def widths(launches: list[Any]) -> list[int]:
    return [decoded(row)[3] for _, grid, args, _ in launches for row in args[1] if decoded(row)[0] < grid[0]]


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda: torch.rand(2, 5, 4), 16),
        (lambda: torch.rand(2, 5, 2), 8),
        (lambda: torch.rand(2, 5, 3), 4),
        (lambda: torch.rand(2, 5, 3).half(), 2),
        (lambda: torch.ones(2, 5, 3, dtype=torch.int8), 1),
        (lambda: torch.rand(41)[1:].view(2, 5, 4), 4),  # starts at an odd element
        (lambda: torch.rand(2, 5, 6)[..., :4], 8),  # tokens 24 bytes apart
        (lambda: torch.rand(2, 5, 2, dtype=torch.complex128), 16),
    ],
    ids=["16", "8", "4", "2", "1", "unaligned", "stride of tokens", "complex128"],
)
def test_vectors_are_as_wide_as_addresses_and_strides_allow(monkeypatch, make, width):
    from tokenprune_kernels.triton import runtime

    t = make()
    gather([t], INDICES, [1])
    seen: list[Any] = []
    monkeypatch.setattr(runtime, "recorder", lambda *launch: seen.append(launch))
    tp.gather_compact([t], INDICES, dims=[1], backend="triton")
    assert widths(seen) == [width]


@pytest.mark.parametrize(
    ("tensors", "launched", "rows", "groups"),
    [
        (lambda: [torch.rand(2, 5, 4)], 1, 1, 1),
        (lambda: [torch.rand(2, 5, 4)] * 4, 1, 1, 1),
        (lambda: [torch.rand(2, 5, 4)] * 64, 1, 1, 8),  # the caches of 32 layers
        (lambda: [torch.rand(2, 5, 4)] * 65, 2, 1, 8),
        (lambda: [torch.rand(2, 5, c) for c in range(1, 5)], 1, 4, 1),
        (lambda: [torch.rand(2, 5, c) for c in range(1, 17)], 1, 16, 2),
        (lambda: [torch.rand(2, 5, c) for c in range(1, 18)], 2, 16, 2),
        (lambda: [torch.rand(2, 5, 4), torch.rand(2, 5, 0), torch.ones(2, 5, dtype=torch.bool)], 1, 4, 1),
    ],
    ids=["one", "4 alike", "64 alike", "65 alike", "4 kinds", "16 kinds", "17 kinds", "an empty one"],
)
def test_tensors_of_all_kinds_share_launches(launches, tensors, launched, rows, groups):
    given_tensors = tensors()
    kept = tp.gather_compact(given_tensors, INDICES, dims=[1] * len(given_tensors), backend="triton")
    assert len(kept) == len(given_tensors)
    assert len(launches) == launched
    assert len(launches[0][2][1]) == rows
    assert len(launches[0][2][2]) == groups


def test_a_long_list_of_mixed_tensors():
    """More tensors and more geometries than a launch takes, in an order that mixes them."""
    sizes = [1 + i * 7 % 19 for i in range(90)]
    dtypes = [torch.float32, torch.int16, torch.bool, torch.float64]
    tensors = [torch.randint(0, 9, (2, 5, c)).to(dtypes[i % 4]) for i, c in enumerate(sizes)]
    gather(tensors, INDICES, [1] * len(tensors))


def test_every_number_looks_alike_to_triton(launches):
    """Odd and beyond 32 bits: no type, no divisibility and no 1 for which Triton would compile again."""
    tensors = [torch.rand(2, 1, 5, 16), torch.ones(2, 5, dtype=torch.int8), torch.rand(1, 2, 5).expand(3, 2, 5)]
    tp.gather_compact(tensors, INDICES, dims=[2, 1, 2], batch_dims=[0, 0, 1], backend="triton")
    ((_, _, (_, table, addresses), _),) = launches
    numbers = [n for row in table for n in row] + [n for group in addresses for pair in group for n in pair]
    assert all(n % 2 == 1 and 2**31 < n < 2**63 for n in numbers)


def test_nothing_to_copy_launches_nothing(launches):
    empty = torch.full((2, 0), -1)
    assert [t.shape for t in tp.gather_compact([torch.rand(2, 5, 3)], empty, dims=[1], backend="triton")] == [(2, 0, 3)]
    tp.gather_compact([torch.rand(2, 5, 0)], INDICES, dims=[1], backend="triton")
    tp.gather_compact([], INDICES, dims=[], backend="triton")
    assert launches == []


def test_more_loops_than_the_table_holds_are_copied_first():
    from tokenprune_kernels.triton.compaction import LOOPS, geometry

    t = torch.arange(3 * 2 * 2 * 5 * 2 * 3).view(3, 2, 2, 5, 2, 3).permute(1, 5, 0, 3, 4, 2)
    assert len(geometry(tuple(t.shape), t.stride(), 8, 3, 0, 4, 4, 1).sizes) > LOOPS
    gather([t], INDICES, [3])


@pytest.mark.parametrize("width", [4, 6])
def test_several_blocks_of_several_tensors(width):
    from tokenprune_kernels.triton.compaction import COPY

    indices = torch.stack([torch.randperm(300)[:150] for _ in range(2)])
    tensors = [torch.rand(2, 300, 4 * width), torch.rand(2, 3, 300, width), torch.rand(2, 3, 300, width)]
    assert tensors[0].numel() // 4 * 150 // 300 > COPY.blocks["BLOCK"]
    gather(tensors, indices, [1, 2, 2])


def test_vectors_numbered_with_64_bits(monkeypatch):
    from tokenprune_kernels.triton import compaction

    monkeypatch.setattr(compaction, "NARROW", 0)
    gather([torch.rand(2, 3, 5, 6).transpose(1, 3), torch.rand(2, 5)], INDICES, [2, 1])


@settings(deadline=None)
@given(st.data())
def test_contiguous_tensors_need_four_loops(data):
    """Whatever the rank, and wherever the token and the batch dimension lie."""
    from tokenprune_kernels.triton.compaction import LOOPS, geometry

    rank = data.draw(st.integers(2, 7))
    shape = tuple(data.draw(st.sampled_from([1, 2, 3, 8])) for _ in range(rank))
    dim, batch_dim = data.draw(st.permutations(range(rank)))[:2]
    of = geometry(shape, torch.empty(shape).stride(), 4, dim, batch_dim, 5, 5, 1)
    assert len(of.sizes) <= LOOPS
    assert of.bytes() == 4 * math.prod(shape) // shape[dim] * 5
    assert of.strides[of.index_strides.index(1)] == 0


def invert(indices: Tensor, size: int) -> Tensor:
    op = _triton.namespace()._invert_indices
    return op(indices.to("cuda"), size).cpu() if gpu_backend.has_gpu() else op(indices, size)


class TestInverse:
    @pytest.mark.parametrize(("size", "kept"), [(1, 1), (63, 64), (64, 65), (65, 200), (300, 3)])
    def test_blocks(self, size, kept):
        indices = torch.randint(-2, size + 2, (3, kept))
        want = tp.reference._invert_indices(indices, size)
        assert torch.equal(invert(indices, size), want)
        assert torch.equal(invert(indices.t().contiguous().t(), size), want)
        assert torch.equal(invert(indices[:1].expand(3, kept), size), want[:1].expand(3, size))

    def test_indices_that_differ_by_a_multiple_of_two_to_the_32(self):
        indices = torch.tensor([[2**32 + 1, 1 - 2**32, 2, 2**63 - 1, -(2**63)]])
        assert invert(indices, 4).tolist() == [[-1, -1, 2, -1]]

    def test_launches(self, launches):
        invert(torch.empty(3, 0, dtype=torch.int64), 130)
        invert(INDICES, 0)
        assert [grid for _, grid, _, _ in launches] == [(9,)]
