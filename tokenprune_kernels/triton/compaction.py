"""Triton kernels of gather_compact, all tensors in one launch, and of the inverse of an index list.

gather_compact: a tensor is a list of output vectors of 16, 8, 4, 2 or 1 bytes, as wide as its addresses and strides
allow, whatever its dtype. A program copies BLOCK consecutive vectors of one tensor. It finds the tensor by the numbers
of its blocks in a table, and from the number of a vector its row, its step of each loop over the row's dimensions, the
token from `indices`, and an offset of 64 bits. A token outside the input gives zeros.
  One launch for up to 64 tensors of up to 16 geometries; grid (blocks of all tensors,). Reads and writes every kept
  element once, and an index of 8 bytes per vector (from cache).

The table is a tuple of integers, kernel parameters all of them: no copy to the device, nothing to synchronise with.
Tensors of equal geometry, such as the caches of all layers, share an entry and add two addresses each. Triton compiles
anew for parameters of other types, for divisible ones and for 1; so every number is written as 2 x + 1 + 2^62, which is
always an odd int64, and tuples have a few fixed lengths.

_invert_indices: for every token its slot among the kept ones. A program owns BLOCK_T tokens of a sample and compares
them with all indices, BLOCK_K at a time; of several slots the last counts.
  One launch, grid (B * ceil(size / BLOCK_T),). Reads the indices once per program, writes [B, size]. No atomics.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .runtime import Config, cdiv, check_indices, fresh, launch

LOOPS = 4  # a contiguous tensor has no more: outer, batch, middle and token in front of the bytes of a row
MAX_GEOMETRIES, MAX_TENSORS = 16, 64  # 20 numbers and 2 addresses: 3.6 KB of parameters, of 4 KB that all GPUs take
GROUP = 8
NARROW = 1 << 31  # vectors of a tensor up to which 32 bits count them

CODE: tl.constexpr = tl.constexpr(1 << 62)
COPY = Config({"BLOCK": 1024}, num_warps=8, num_stages=1)
INVERT = Config({"BLOCK_T": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2)


class Geometry(NamedTuple):
    """How tensors lie in memory, in bytes: rows of `run` contiguous bytes, and loops over rows, the innermost first."""

    run: int
    tokens: int
    token_stride: int
    sizes: tuple[int, ...]  # of the output
    strides: tuple[int, ...]  # of the input; 0 for the loop over tokens, whose offset comes from the index
    index_strides: tuple[int, ...]  # in entries of `indices`: nonzero for the loops over tokens and over the batch

    def bytes(self) -> int:
        total = self.run
        for size in self.sizes:
            total *= size
        return total


@functools.lru_cache(maxsize=1024)
def geometry(
    shape: tuple[int, ...], stride: tuple[int, ...], element: int, dim: int, batch_dim: int,
    kept: int, batch_stride: int, entry_stride: int,
) -> Geometry:  # fmt: skip
    """Dimensions behind the tokens that are contiguous make up the row; neighbours that one stride walks are a loop."""
    run = element
    sizes: list[int] = []
    strides: list[int] = []
    index_strides: list[int] = []
    in_run, after_plain = True, False
    for d in reversed(range(len(shape))):
        # The stride of a dimension that is never walked may be anything.
        size, step = shape[d], stride[d] * element if shape[d] > 1 else 0
        if size == 1 and d != dim:
            continue
        plain = d not in (dim, batch_dim)
        in_run = in_run and plain and step == run
        if in_run:
            run *= size
        elif plain and after_plain and step == sizes[-1] * strides[-1]:
            sizes[-1] *= size
        else:
            sizes.append(kept if d == dim else size)
            strides.append(0 if d == dim else step)
            index_strides.append(entry_stride if d == dim else batch_stride if d == batch_dim else 0)
        after_plain = plain and not in_run
    tokens = shape[dim]
    token_stride = stride[dim] * element if tokens > 1 else 0
    return Geometry(run, tokens, token_stride, tuple(sizes), tuple(strides), tuple(index_strides))


class Plan(NamedTuple):
    """One launch: grid, table, addresses (from, to) in groups of 8; narrow: 32 bits number each tensor's vectors."""

    blocks: int
    table: tuple[tuple[int, ...], ...]
    addresses: tuple[tuple[tuple[int, ...], ...], ...]
    narrow: bool


def coded(*values: int) -> tuple[int, ...]:
    """The table for the kernel: numbers that Triton cannot tell apart by type, divisibility or being 1."""
    return tuple(CODE.value + 2 * value + 1 for value in values)


def _padded(count: int, lengths: tuple[int, ...]) -> int:
    return next(length for length in lengths if count <= length)


def _plan(kinds: list[tuple[Geometry, int, list[tuple[int, int]]]]) -> Plan:
    """The launch for tensors [(geometry, vector width, [(from, to)])]."""
    blocks, narrow = 0, True
    table: list[tuple[int, ...]] = []
    addresses: list[tuple[int, int]] = []
    for of, width, tensors in kinds:
        vectors, spare = of.bytes() // width, LOOPS - len(of.sizes)
        narrow = narrow and vectors < NARROW
        per_tensor = cdiv(vectors, COPY.blocks["BLOCK"])
        table.append(
            coded(
                blocks, per_tensor, len(addresses), width, vectors,
                of.run // width, of.tokens, of.token_stride // width,
                *of.sizes, *[1] * spare, *(s // width for s in of.strides), *[0] * spare,
                *of.index_strides, *[0] * spare,
            )
        )  # fmt: skip
        addresses += tensors
        blocks += per_tensor * len(tensors)
    # No block has a number as high as the first block of a geometry that is not there.
    nothing = coded(blocks, *[0] * (len(table[0]) - 1))
    table += [nothing] * (_padded(len(table), (1, 4, MAX_GEOMETRIES)) - len(table))
    addresses += [(0, 0)] * (_padded(len(addresses), (1, 4, 16, MAX_TENSORS)) - len(addresses))
    pairs = [coded(*pair) for pair in addresses]
    groups = tuple(tuple(pairs[i : i + GROUP]) for i in range(0, len(pairs), GROUP))
    return Plan(blocks, tuple(table), groups, narrow)


def plans(copies: Sequence[tuple[Geometry, int, int]]) -> list[Plan]:
    """Launches for tensors (geometry, address of the input, of the output)."""
    groups: dict[tuple[Geometry, int], list[tuple[int, int]]] = {}
    for of, start, to in copies:
        if of.bytes() == 0:
            continue
        fits = 16 | of.run | of.token_stride | start | to
        for stride in of.strides:
            fits |= stride
        groups.setdefault((of, fits & -fits), []).append((start, to))
    launches: list[list[tuple[Geometry, int, list[tuple[int, int]]]]] = []
    room = 0
    for (of, width), tensors in groups.items():
        while tensors:
            if room == 0 or len(launches[-1]) == MAX_GEOMETRIES:
                launches.append([])
                room = MAX_TENSORS
            launches[-1].append((of, width, tensors[:room]))
            taken = len(launches[-1][-1][2])
            tensors, room = tensors[taken:], room - taken
    return [_plan(kinds) for kinds in launches]


@triton.jit
def _move(source, target, offset, number, kept, inside, PART: tl.constexpr, PARTS: tl.constexpr):
    """Vectors of PARTS elements of type PART: those at `offset` to `number`, zeros where there is no token to keep."""
    source, target = source.to(tl.pointer_type(PART)), target.to(tl.pointer_type(PART))
    if PARTS > 1:  # 16 bytes are two parts, moved at once: the hint tells Triton what the host has made sure of
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
    part = tl.arange(0, PARTS)[None, :]
    value = tl.load(source + (offset[:, None] * PARTS + part), mask=kept[:, None], other=0)
    tl.store(target + (number[:, None] * PARTS + part), value, mask=inside[:, None])


@triton.jit(do_not_specialize=["indices_ptr"])
def gather_compact_kernel(
    indices_ptr, table, addresses, GROUP: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """table: a row of 8 + 3 * 4 numbers per geometry; addresses: GROUP times (from, to); both as `coded` makes them.

    COUNT: the type that numbers the vectors of a tensor.
    """
    block = tl.program_id(0).to(tl.int64)
    row = table[0]
    for g in tl.static_range(1, len(table)):
        if block * 2 + (CODE + 1) >= table[g][0]:
            row = table[g]
    row = [value - CODE >> 1 for value in row]
    which = (block - row[0]) // row[1]  # of the tensors of this geometry
    slot = row[2] + which
    group = addresses[0]
    for g in tl.static_range(1, len(addresses)):
        if slot >= g * GROUP:
            group = addresses[g]
    slot = slot % GROUP
    address = group[0]
    for t in tl.static_range(1, len(group)):
        if slot == t:
            address = group[t]
    source, target = address[0] - CODE >> 1, address[1] - CODE >> 1

    number = (block - row[0] - which * row[1]) * BLOCK + tl.arange(0, BLOCK)
    inside = number < row[4]
    rest = number.to(COUNT)
    outer = rest // row[5].to(COUNT)
    offset = (rest - outer * row[5].to(COUNT)).to(tl.int64)
    slot = tl.full([BLOCK], 0, tl.int64)
    for d in tl.static_range(4):
        if row[8 + d] > 1:
            rest = outer
            outer = rest // row[8 + d].to(COUNT)
            at = (rest - outer * row[8 + d].to(COUNT)).to(tl.int64)
            offset += at * row[12 + d]
            slot += at * row[16 + d]
    token = tl.load(indices_ptr + slot, mask=inside, other=-1)
    kept = inside & (token >= 0) & (token < row[6])
    offset += tl.where(kept, token, 0) * row[7]
    width = row[3]
    if width == 16:
        _move(source, target, offset, number, kept, inside, tl.int64, 2)
    elif width == 8:
        _move(source, target, offset, number, kept, inside, tl.int64, 1)
    elif width == 4:
        _move(source, target, offset, number, kept, inside, tl.int32, 1)
    elif width == 2:
        _move(source, target, offset, number, kept, inside, tl.int16, 1)
    else:
        _move(source, target, offset, number, kept, inside, tl.int8, 1)


@triton.jit
def invert_indices_kernel(
    indices_ptr, slots_ptr, kept, size, batch_stride, entry_stride, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    ranges = (size + BLOCK_T - 1) // BLOCK_T
    sample = (tl.program_id(0) // ranges).to(tl.int64)
    begin = (tl.program_id(0) % ranges).to(tl.int64) * BLOCK_T
    indices_ptr += sample * batch_stride
    token = tl.arange(0, BLOCK_T)
    best = tl.full([BLOCK_T, BLOCK_K], -1, tl.int32)
    for start in range(0, kept, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        index = tl.load(indices_ptr + n.to(tl.int64) * entry_stride, mask=n < kept, other=-1) - begin
        here = tl.where((index >= 0) & (index < BLOCK_T), index, -1).to(tl.int32)
        best = tl.where(here[None, :] == token[:, None], n[None, :], best)  # n grows: the last slot stays
    slot = tl.max(best, 1).to(tl.int64)
    tl.store(slots_ptr + sample * size + begin + token, slot, mask=begin + token < size)


def gather_compact(
    tensors: Sequence[Tensor], indices: Tensor, *, dims: Sequence[int], batch_dims: Sequence[int] | None = None
) -> list[Tensor]:
    outputs: list[Tensor] = _fakes.gather_compact(tensors, indices, dims=dims, batch_dims=batch_dims)
    if not outputs:
        return []
    fresh(*outputs)
    kept = indices.shape[1]
    check_indices("gather_compact", "indices", indices, min(t.shape[d] for t, d in zip(tensors, dims, strict=True)))
    copies, alive = [], []
    for i, (t, to) in enumerate(zip(tensors, outputs, strict=True)):
        dim, batch_dim = dims[i] % t.dim(), 0 if batch_dims is None else batch_dims[i] % t.dim()
        common = (t.element_size(), dim, batch_dim, kept, *indices.stride())
        of = geometry(tuple(t.shape), t.stride(), *common)
        if len(of.sizes) > LOOPS:
            t = t.contiguous()
            alive.append(t)  # until its launch is queued
            of = geometry(tuple(t.shape), t.stride(), *common)
        copies.append((of, t.data_ptr(), to.data_ptr()))
    for plan in plans(copies):
        launch(
            gather_compact_kernel, (plan.blocks,), indices,
            indices, plan.table, plan.addresses,
            config=COPY, GROUP=GROUP, COUNT=tl.uint32 if plan.narrow else tl.int64,
        )  # fmt: skip
    return outputs


def _invert_indices(indices: Tensor, size: int) -> Tensor:
    slots: Tensor = fresh(_fakes._invert_indices(indices, size))
    batch, kept = indices.shape
    launch(
        invert_indices_kernel, (batch * cdiv(size, INVERT.blocks["BLOCK_T"]),), indices,
        indices, slots, kept, size, indices.stride(0), indices.stride(1),
        config=INVERT,
    )  # fmt: skip
    return slots
