"""The promises of the op contract that concern memory, threads and gradients: strides, offsets, untouched inputs."""

import functools
import os

import pytest
import torch
from torch import Tensor

from testing import op_samples as samples
from testing.cases import dtypes_of, interpreted, over_backends
from testing.op_samples import Sizes, make, map_tensors, run
from tests.ops.test_contract import COMPILED, assert_same, assert_same_bits, bits, over_ops, over_samples, with_floats


def _sliced(t: Tensor) -> Tensor:
    big = t.new_empty([2 * size + 3 for size in t.shape]).fill_(True)
    view = big[tuple(slice(1, 1 + 2 * size, 2) for size in t.shape)]
    return view.copy_(t)


def _in_wider_rows(t: Tensor) -> Tensor:
    return t.new_empty((*t.shape[:-1], t.shape[-1] + 5)).fill_(True)[..., 2 : 2 + t.shape[-1]].copy_(t)


def _offset(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 3)[3:].view(t.shape).copy_(t)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "leading dimensions swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t,
    "every second element": _sliced,
    "inside wider rows": _in_wider_rows,
    "storage offset": _offset,
    "batch of stride 0": lambda t: t[:1].expand_as(t),
    "tokens of stride 0": lambda t: t.narrow(-2, 0, 1).expand_as(t) if t.dim() > 2 else t,
    "last dimension of stride 0": lambda t: t[..., :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@over_backends
@over_samples
def test_any_strides_give_the_contiguous_result(op: str, name: str, backend: str, layout: str) -> None:
    call = map_tensors(make(op, name, dtype=torch.float16), lambda _, t: LAYOUTS[layout](t))
    contiguous = map_tensors(call, lambda _, t: t.contiguous().clone(memory_format=torch.contiguous_format))
    assert_same(run(call, backend), run(contiguous, backend), backend)


@functools.cache
def _sparse_memory() -> Tensor:
    """20 GiB of address space; only the pages that are written exist."""
    import mmap

    return torch.frombuffer(
        mmap.mmap(-1, 20 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000), dtype=torch.uint8
    )


def _far_apart(t: Tensor, batch_dim: int) -> Tensor:
    """The samples of t more than 2^31 elements apart (8-byte elements: 2^30, more than 2^31 bytes)."""
    if t.numel() == 0:
        return t
    strides = list(t.contiguous().stride())
    strides[batch_dim] = (1 << (31 if t.element_size() < 8 else 30)) + 64
    memory = _sparse_memory().view(t.dtype)
    return memory.as_strided(t.shape, strides).copy_(t)


@over_backends
@over_ops
def test_offsets_beyond_32_bits(op: str, backend: str) -> None:
    """Each tensor in turn: they share one sparse buffer."""
    call = make(op, list(samples.FACTORIES[op])[-1], Sizes(batch=2, tokens=9, channels=8, k=3))
    want = run(call, backend)
    for which, _, batch_dim in list(samples.tensors(call)):
        if batch_dim != 0:
            continue
        far = map_tensors(call, lambda n, t, which=which: _far_apart(t, 0) if n == which else t)
        assert_same(run(far, backend), want, backend)


@over_backends
@over_samples
def test_inputs_are_not_modified(op: str, name: str, backend: str) -> None:
    for layout in ("storage offset", "transposed"):
        call = map_tensors(make(op, name), lambda _, t, layout=layout: LAYOUTS[layout](t))
        before = [(t, bits(t).clone(), t._version, t.stride(), t.data_ptr()) for _, t, _ in samples.tensors(call)]
        run(call, backend)
        for t, memory, version, stride, address in before:
            assert torch.equal(bits(t), memory)
            assert (t._version, t.stride(), t.data_ptr()) == (version, stride, address)


@over_backends
@over_samples
def test_outputs_are_fresh_contiguous_and_of_the_promised_shape_and_dtype(op: str, name: str, backend: str) -> None:
    for dtype in (torch.float16, dtypes_of(backend)[-1]):
        call = make(op, name, dtype=dtype)
        got = run(call, backend)
        assert [(tuple(g.shape), g.dtype) for g in got] == samples.promised(call)
        assert all(g.is_contiguous() for g in got)
        taken = {t.untyped_storage().data_ptr() for _, t, _ in samples.tensors(call)}
        for g in got:
            assert g.untyped_storage().data_ptr() not in taken
            taken.add(g.untyped_storage().data_ptr())


@pytest.mark.parametrize("backend", COMPILED)
@over_samples
def test_no_element_of_an_output_is_left_unwritten(op: str, name: str, backend: str) -> None:
    """The package fills fresh memory with NaN and 0x5A bytes under TOKENPRUNE_POISON (set in conftest.py)."""
    assert os.environ["TOKENPRUNE_POISON"] == "1"
    for sizes in (Sizes(), Sizes(tokens=5, k=9), Sizes(tokens=1, k=3, rows=1, heads=2), Sizes(tokens=0, k=3, listed=3)):
        for g in run(make(op, name, sizes), backend):
            if op == "gather_compact":
                continue  # compared bit by bit with the reference above; any value is legal here
            poison = g.isnan() if g.is_floating_point() else g == 0x5A5A5A5A5A5A5A5A
            assert not bool(poison.any())


@over_backends
@over_samples
def test_repeated_calls_are_bitwise_equal(op: str, name: str, backend: str) -> None:
    call = make(op, name)
    first = run(call, backend)
    for _ in range(3 if interpreted(backend) else 20):
        assert_same_bits(run(call, backend), first)


@pytest.mark.parametrize("backend", COMPILED)
@over_samples
def test_results_do_not_depend_on_the_number_of_threads(op: str, name: str, backend: str) -> None:
    """Large enough that the work is shared out. aten's own matrix products make no such promise: no reference here."""
    large = Sizes(batch=3, tokens=700, rows=9, channels=96, k=40, listed=50)
    # Triton's interpreter knows one thread; what is left to see is that torch's threads have no part in the kernels.
    call = make(op, name, Sizes(tokens=150, k=10) if interpreted(backend) else large)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(call, backend))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@over_backends
@over_samples
def test_scores_and_indices_carry_no_gradient(op: str, name: str, backend: str) -> None:
    call = with_floats(make(op, name), lambda _, t: t.clone().requires_grad_())
    got = run(call, backend)
    if op == "gather_compact":
        assert [g.requires_grad for g in got] == [g.is_floating_point() for g in got]
    else:
        assert not any(g.requires_grad for g in got)
        assert_same(got, run(make(op, name), backend), backend)
