"""What passes the boundary and is no ordinary tensor: it is read for what it means, or refused by name, never a crash.

Through the Python functions and through the ops of every namespace, whose bindings check for themselves.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tokenprune_kernels as tp
from testing import op_samples as samples
from testing.cases import NO_EMULATOR, NO_TRITON, backends_of, interpreted, lacks, over_backends
from testing.op_inputs import flags, integers
from testing.op_samples import OPS, SAMPLE_IDS, SAMPLES, Call, Sizes, make, map_tensors, outputs, positional, run
from tests.ops.test_contract import assert_same
from tests.ops.test_errors import RICHEST, _rich, too_much_work
from tokenprune_kernels import _backend, _checks, _triton
from tokenprune_kernels import _op as described

over_ops = pytest.mark.parametrize("op", OPS)
over_samples = pytest.mark.parametrize(("op", "name"), SAMPLES, ids=SAMPLE_IDS)
SMALL = Sizes(tokens=11, channels=8, k=4)
HUGE = (2**40, 2**61, 2**62)
ONES = Sizes(1, 1, 1, 1, 1, 1, 1, 1, 1)


def _namespaces(op: str) -> Iterator[Any]:
    """Where an op on CPU tensors is: the package's, the emulated CUDA kernels', Triton's."""
    yield torch.ops.tokenprune
    if not NO_EMULATOR and not lacks("emulator", op):
        yield _backend._extra["emulator"][0]
    if not NO_TRITON and interpreted("triton") and not lacks("triton", op):
        yield _triton.namespace()


def _every_way(call: Call) -> Iterator[tuple[type[Exception], Any]]:
    """(the error that a wrong call ends in, how to make it) through all functions and ops."""
    args, kwargs = positional(call)
    for ops in _namespaces(call.op):
        yield RuntimeError, lambda ops=ops: getattr(ops, call.op)(*args, **kwargs)
    for backend in backends_of(call.op):
        yield (ValueError, TypeError, RuntimeError), lambda backend=backend: run(call, backend)


# --- sizes that only stride 0 makes ---------------------------------------------------------------------------------


def _expanded(op: str, which: str, size: int, others: Sizes) -> Call:
    """The richest sample of an op with one of its sizes huge, by stride 0, in every tensor that has it."""
    smaller, larger = (make(op, RICHEST[op], replace(ONES, **{which: n})) for n in (2, 3))
    shapes = {}
    for (argument, a, _), (_, b, _), (_, c, _) in zip(
        samples.tensors(smaller), samples.tensors(larger), samples.tensors(make(op, RICHEST[op], others)), strict=True
    ):
        pairs = zip(a.shape, b.shape, c.shape, strict=True)
        shapes[argument] = [size if x != y else z for x, y, z in pairs]
    one = make(op, RICHEST[op], replace(others, **{which: 1}))
    first = map_tensors(one, lambda n, t: t[tuple(slice(1 if s == size else None) for s in shapes[n])])
    return map_tensors(first, lambda n, t: t.expand(shapes[n]))


SIZED = [(op, which) for op in OPS for which in samples.SIZES_OF[op] if which != "k"]
SIZED += [(op, "channels") for op in OPS if "attention" in op]  # D, which may not be 0


@pytest.mark.parametrize(("op", "which"), SIZED)
def test_sizes_beyond_every_memory_are_refused_by_name(op: str, which: str) -> None:
    """Also where a size of 0 beside them means that there is nothing to compute."""
    wrong = []
    for others in (ONES, replace(ONES, k=0, listed=0), replace(ONES, rows=0, tokens=0, k=0, listed=0)):
        for size in HUGE:
            with contextlib.suppress(RuntimeError):  # where torch has no such tensor
                wrong.append(_expanded(op, which, size, others))
    assert len(wrong) >= 3
    for call in wrong:
        for errors, attempt in _every_way(call):
            named = rf"tokenprune::{op}: \w+(\[\d\])? must have fewer than 2\^40 elements"
            with pytest.raises(errors, match=named):
                attempt()


@pytest.mark.parametrize("op", samples.SELECTING)
def test_a_k_beyond_every_memory_is_refused_by_name(op: str) -> None:
    name = samples.count_of(op)
    for batch in (0, 1, 2):
        for k in (*HUGE, 2**63 - 1):
            call = samples.with_arguments(make(op, RICHEST[op], replace(SMALL, batch=batch)), **{name: k})
            for errors, attempt in _every_way(call):
                with pytest.raises(errors, match=rf"tokenprune::{op}: {name} must keep B \* {name} below 2\^40"):
                    attempt()


@pytest.mark.parametrize("op", [op for op in OPS if described.OPS[op].work])
def test_products_of_sizes_of_several_arguments_are_bounded(op: str) -> None:
    """Each tensor is of a size that memory might have; all pairs of their entries are not to be had."""
    for errors, attempt in _every_way(too_much_work(op)):
        with pytest.raises(errors, match=rf"tokenprune::{op}: \w+ must keep [\w *(),]+ below 2\^56, got \["):
            attempt()


@over_ops
def test_symbolic_sizes_get_no_guard_from_the_check_of_sizes(op: str) -> None:
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:
        samples.run_op(map_tensors(make(op), lambda _, t: mode.from_tensor(t)))
    assert not [guard.expr for guard in environment.guards if str(_checks.MOST_ELEMENTS) in str(guard.expr)]


# --- tensors without memory, nested, sparse, quantised ----------------------------------------------------------------


def _zeros_without_memory(call: Call, which: str) -> Call:
    return map_tensors(call, lambda n, t: torch._efficientzerotensor(t.shape, dtype=t.dtype) if n == which else t)


@over_ops
def test_tensors_of_zeros_without_memory_are_zeros(op: str) -> None:
    call = _rich(op)
    for which, _, _ in list(samples.tensors(call)):
        zeros = _zeros_without_memory(call, which)
        want = map_tensors(call, lambda n, t, which=which: torch.zeros_like(t) if n == which else t)
        for backend in backends_of(op):
            assert_same(run(zeros, backend), run(want, backend), backend)


@over_ops
def test_tensors_without_memory_are_refused_where_the_dispatcher_leaves_them(op: str) -> None:
    """With its key excluded, as some states of torch.func have it, nothing has made zeros of them."""
    call = _rich(op)
    zero = torch._C.DispatchKeySet(torch._C.DispatchKey.ZeroTensor)
    for which, _, _ in list(samples.tensors(call)):
        for errors, attempt in _every_way(_zeros_without_memory(call, which)):
            with (
                torch._C._ExcludeDispatchKeyGuard(zero),
                pytest.raises(errors, match=rf"tokenprune::{op}: {which.replace('[', '.')[:-1]}.* must have memory"),
            ):
                attempt()


def _nested(t: Tensor, layout: torch.layout, components: int) -> Tensor:
    return torch.nested.nested_tensor([t] * components, layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("components", [0, 2])
@over_ops
def test_nested_tensors_under_vmap_are_refused(op: str, components: int) -> None:
    """torch's loop over their components divides by the number of components."""
    call = _rich(op)
    for which, t, _ in list(samples.tensors(call)):
        many = _nested(t, torch.strided, components)

        def apply(x: Tensor, which: str = which) -> Any:
            return samples.run_op(map_tensors(call, lambda n, shared: x if n == which else shared))

        with pytest.raises(RuntimeError, match=f"tokenprune::{op}: tensors must be dense, got a nested one"):
            torch.vmap(apply)(many)


@over_ops
def test_scalars_under_vmap_are_refused(op: str) -> None:
    """The index of the batch dimension is taken modulo the number of dimensions, of which they have none."""
    call = _rich(op)
    for which, t, _ in list(samples.tensors(call)):

        def apply(x: Tensor, which: str = which) -> Any:
            return samples.run_op(map_tensors(call, lambda n, shared: x if n == which else shared))

        with pytest.raises(RuntimeError, match=f"tokenprune::{op}: tensors must have a batch dimension"):
            torch.vmap(apply)(torch.zeros(3, dtype=t.dtype))


@pytest.mark.filterwarnings("ignore")  # torch says that quantised tensors are old
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_quantised_tensors_under_vmap_are_refused(backend: str) -> None:
    """There `is_quantized` is False, and moving a dimension of one ends the process."""
    many = torch.quantize_per_tensor(torch.randn(2, 3, 4, 5), 0.1, 0, torch.quint8)
    indices = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises((TypeError, RuntimeError), match=r"gather_compact: tensors\[0\] must be a dense tensor"):
        torch.vmap(lambda t: tp.gather_compact([t], indices, dims=[1], backend=backend))(many)


KINDS = {
    "nested": lambda t: _nested(t[0], torch.strided, len(t)),
    "jagged": lambda t: _nested(t[0], torch.jagged, len(t)),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # torch says of several of these kinds that they are new, or old
@pytest.mark.parametrize("kind", KINDS)
@over_ops
def test_tensors_that_are_not_dense_are_refused_by_name(op: str, kind: str) -> None:
    call = _rich(op)
    for which, t, _ in list(samples.tensors(call)):
        if kind == "quantised" and not t.is_floating_point():
            continue
        try:
            strange = KINDS[kind](t)
        except (RuntimeError, ValueError, IndexError):
            continue  # torch makes none of this kind from such a shape
        wrong = map_tensors(call, lambda n, t, which=which, strange=strange: strange if n == which else t)
        for _, attempt in _every_way(wrong):
            with pytest.raises((RuntimeError, TypeError, ValueError), match=op):
                attempt()


# --- masks ------------------------------------------------------------------------------------------------------------


def _any_true(mask: Tensor, seed: int) -> Tensor:
    """The same mask with every True stored as another byte than 0."""
    byte = torch.randint(1, 256, mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    byte = torch.where(torch.arange(byte.numel()).view(mask.shape) % 2 == 0, byte, 2)  # even ones, too, for certain
    return torch.where(mask, byte, 0).view(torch.bool)


MASK_LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.view(torch.uint8).mT.contiguous().mT.view(torch.bool),
    "offset": lambda t: torch.nn.functional.pad(t.view(torch.uint8), (3, 2))[:, 3:-2].view(torch.bool),
}


@pytest.mark.parametrize("layout", MASK_LAYOUTS)
@over_backends
@over_samples
def test_every_byte_but_zero_means_true(op: str, name: str, backend: str, layout: str) -> None:
    call = make(op, name, Sizes(tokens=41, rows=19, channels=16, k=7))
    masks = [n for n, t, _ in samples.tensors(call) if t.dtype == torch.bool]
    if op == "cosine_scores":
        call = samples.with_arguments(call, query_mask=flags(2, 19, seed=1))
        masks = ["query_mask"]
    if not masks:
        return
    strange = map_tensors(call, lambda n, t: MASK_LAYOUTS[layout](_any_true(t, len(n))) if n in masks else t)
    got = [t.view(torch.uint8) != 0 if t.dtype == torch.bool else t for t in run(strange, backend)]  # copied bytes
    assert_same(got, run(call, backend), backend)


@over_backends
def test_many_rows_whose_mask_bytes_are_not_one(backend: str) -> None:
    """Enough rows that several parts of them are combined, and count for the mean."""
    rows = 150 if interpreted(backend) else 700
    query, key = (integers(-2, 3, 1, 2, n, 16, dtype=torch.float32, seed=n) for n in (rows, 65))
    mask = flags(1, rows, seed=1)
    for reduction in ("mean", "last", "max+mean"):
        want = tp.cross_attention_scores(query, key, query_mask=mask, query_reduction=reduction, backend=backend)
        got = tp.cross_attention_scores(
            query, key, query_mask=_any_true(mask, 2), query_reduction=reduction, backend=backend
        )
        assert_same(outputs(got), outputs(want), backend)


# --- any dtype ------------------------------------------------------------------------------------------------------


def _all_dtypes() -> list[torch.dtype]:
    """The dtypes of whole bytes that are no larger than int64 but for complex128: what torch makes tensors of."""
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted((d for d in found if not str(d).startswith(("torch.q", "torch.bits"))), key=str)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", _all_dtypes(), ids=str)
@over_backends
def test_gather_compact_takes_any_dtype(backend: str, dtype: torch.dtype) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    memory = torch.randint(0, 256, (2, 5, 3 * size), dtype=torch.uint8)
    indices = torch.tensor([[0, 3, -1], [4, -1, 1]])
    chosen = [[memory[b, i] if i >= 0 else torch.zeros_like(memory[b, 0]) for i in indices[b]] for b in range(2)]
    want = torch.stack([torch.stack(row) for row in chosen])
    (got,) = tp.gather_compact([memory.view(dtype)], indices, dims=[1], backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), want)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64])
@over_backends
def test_gather_compact_of_lazily_conjugated_and_negated_tensors(backend: str, dtype: torch.dtype) -> None:
    t = torch.complex(torch.arange(30.0).view(2, 5, 3), torch.arange(30.0, 60.0).view(2, 5, 3)).to(dtype)
    indices = torch.tensor([[0, 3, -1], [4, -1, 1]])
    for lazy in (t.conj(), t.conj().imag):
        (got,) = tp.gather_compact([lazy], indices, dims=[1], backend=backend)
        (want,) = tp.gather_compact([lazy.resolve_conj().resolve_neg().clone()], indices, dims=[1], backend=backend)
        assert torch.equal(torch.view_as_real(got) if got.is_complex() else got,
                           torch.view_as_real(want) if want.is_complex() else want)  # fmt: skip
