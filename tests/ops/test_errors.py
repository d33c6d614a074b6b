"""Wrong arguments: the error names the op and the argument, comes before any work, and leaves the process healthy."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tokenprune_kernels as tp
from testing import op_samples as samples
from testing.cases import BACKENDS, GPU_BACKENDS, backends_of, over_backends
from testing.op_samples import OPS, Call, Sizes, make, run, run_op, with_arguments
from tokenprune_kernels import _checks
from tokenprune_kernels import _op as described
from tokenprune_kernels._accept import good_sizes
from tokenprune_kernels._op import AtLeast, Choice, Number, TensorKind

over_ops = pytest.mark.parametrize("op", OPS)
RICHEST = {op: list(samples.FACTORIES[op])[-1] for op in OPS} | {
    "cross_attention_scores": "everything",
    "repulsion_sample": "seeded_sum",
    "spatial_semantic_nms": "hard_grouped",
}


def _of_kind(op: str, kind: type) -> Iterator[tuple[str, Any]]:
    return ((a.name, a.kind) for a in described.OPS[op].arguments if isinstance(a.kind, kind))


def _outside(number: Number) -> tuple[float, ...]:
    below = number.low if number.above else number.low - 0.1
    return (*(v for v in (below, number.low - 1.0, number.high + 0.01) if math.isfinite(v)), math.nan)


OPTIONS = {op: tuple(name for name, _ in _of_kind(op, Choice)) for op in OPS if any(_of_kind(op, Choice))}
BAD_INDICES = (-2, -(2**63), 2**31, 2**62, 2**63 - 1)


def _rich(op: str) -> Call:
    """A call with every optional tensor of its op."""
    sizes = Sizes(tokens=11, channels=8, k=4)
    call = make(op, RICHEST[op], sizes)
    return with_arguments(call, **{**samples.optional_tensors(op, sizes), **call.arguments})


def too_much_work(op: str) -> Call:
    """As few sizes of 2^32 as make the op's work too much; each tensor is of a size that memory might have."""
    description = described.OPS[op]
    kinds: dict[str, Any] = {a.name: a.kind for a in description.arguments if a.required}
    named = {size for name, kind in kinds.items() for size in getattr(kind, "shape", [name])}
    free = [size for size in description.sizes if size in named]
    for long in itertools.chain.from_iterable(itertools.combinations(free, n) for n in (1, 2, 3)):
        sizes = {size: 2**32 if size in long else 1 for size in free}
        if math.prod(_checks._factors(description)(*(sizes.get(s, -1) for s in description.sizes))) < _checks.MOST_WORK:
            continue
        tensors = ((name, kind) for name, kind in kinds.items() if isinstance(kind, TensorKind))
        shapes = {name: [sizes.get(s, 2) for s in kind.shape] for name, kind in tensors}
        if all(math.prod(shape) < _checks.MOST_ELEMENTS for shape in shapes.values()):
            far = {name: torch.zeros(1, dtype=kinds[name].dtypes[0]).expand(shape) for name, shape in shapes.items()}
            return Call(
                op,
                {name: (far | sizes).get(name, value) for name, value in make(op).arguments.items() if name in kinds},
            )
    raise AssertionError(f"{op}: no sizes are too much work")


def wrong_calls(op: str) -> Iterator[tuple[str, str, Call]]:
    """(what is wrong, the argument that the message must name, the call), one fault at a time."""
    call = _rich(op)
    points = {name for name, kind in _of_kind(op, TensorKind) if kind.coordinates}  # integers are taken
    first = True
    for name, t, _ in list(samples.tensors(call)):
        if name.startswith("tensors["):
            continue  # any dtype and rank is legal; see test_gather_compact_names_what_does_not_fit
        yield "rank", name, with_arguments(call, **{name: t.unsqueeze(0)})
        wrong = torch.float32 if t.dtype in (torch.bool, torch.int64) else torch.bool if name in points else torch.int32
        yield "dtype", name, with_arguments(call, **{name: t.to(wrong)})
        yield "complex", name, with_arguments(call, **{name: t.to(torch.complex64)})
        if not first:
            yield "batch size", name, with_arguments(call, **{name: torch.cat([t, t[:1]])})
            yield "device", name, with_arguments(call, **{name: t.to("meta")})
        first = False
    counted = samples.count_of(op)
    if counted:
        for k in (-1, -(2**62)):
            yield f"k = {k}", counted, with_arguments(call, **{counted: k})
    for name, least in _of_kind(op, AtLeast):
        for value in (least.low - 1, -(2**62)):
            yield f"integer {value}", name, with_arguments(call, **{name: value})
    for name in OPTIONS.get(op, ()):
        for value in ("nonsense", "", "MAX", "max\0", "max+", "é"):
            yield f"option {value!r}", name, with_arguments(call, **{name: value})
    for name, number in _of_kind(op, Number):
        for value in _outside(number):
            yield f"number {value}", name, with_arguments(call, **{name: value})
    work = described.OPS[op].work
    if work is not None:
        yield "work", work[0], too_much_work(op)


def _assert_good_call_works(op: str) -> None:
    call = make(op)
    for got, want in zip(run(call, backends_of(op)[0]), run(call, "reference"), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@over_backends
@over_ops
def test_python_functions_raise_value_or_type_errors_that_name_op_and_argument(op: str, backend: str) -> None:
    for fault, argument, call in wrong_calls(op):
        with pytest.raises((ValueError, TypeError), match=rf"(?s)tokenprune::{op}: {argument}.* must .*got ") as caught:
            run(call, backend)
        assert caught.type in (ValueError, TypeError), fault
    _assert_good_call_works(op)


@over_ops
def test_ops_raise_runtime_errors_that_name_op_and_argument(op: str) -> None:
    for fault, argument, call in wrong_calls(op):
        with pytest.raises(RuntimeError, match=rf"(?s)tokenprune::{op}: {argument}.* must .*got ") as caught:
            run_op(call)
        assert caught.type is RuntimeError, fault
    _assert_good_call_works(op)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled library is not loaded")
@pytest.mark.parametrize("op", [op for op in OPS if "cpu" in described.OPS[op].backends])
def test_python_and_cpp_say_the_same(op: str) -> None:
    for fault, _, call in wrong_calls(op):
        with pytest.raises((ValueError, TypeError)) as of_python:
            run(call, "cpu")
        with pytest.raises(RuntimeError) as of_cpp:
            run_op(call)
        if "device" not in fault:  # tensors of two devices: no kernel is asked
            said = str(of_python.value).split("\0")[0]  # where the text of a C++ exception ends
            assert str(of_cpp.value).splitlines()[0].removesuffix("'") == said.removesuffix("'"), fault


@over_backends
@over_ops
def test_missing_tensors_are_named(op: str, backend: str) -> None:
    call = make(op)
    schema = getattr(torch.ops.tokenprune, op).default._schema
    required = [a.name for a in schema.arguments if str(a.type) in ("Tensor", "List[Tensor]")]
    for name, value in itertools.product(required, (None, 3, "text")):
        with pytest.raises((ValueError, TypeError), match=rf"tokenprune::{op}: {name}"):
            run(with_arguments(call, **{name: value}), backend)
        with pytest.raises((RuntimeError, TypeError), match=name):
            run_op(with_arguments(call, **{name: value}))
    _assert_good_call_works(op)


@over_backends
@pytest.mark.parametrize("op", samples.SELECTING)
def test_k_must_be_an_integer(op: str, backend: str) -> None:
    name = str(samples.count_of(op))
    for value in ("3", True, {}, torch.ones(2, 2), *([None] if op != "mask_to_indices" else [])):  # None: N
        with pytest.raises(TypeError, match=rf"tokenprune::{op}: {name} must be an int"):
            run(with_arguments(make(op), **{name: value}), backend)


@over_backends
@pytest.mark.parametrize("op", [op for op in OPS if samples.INDEX_INPUTS & set(_rich(op).arguments)])
def test_index_values_out_of_range_raise_index_errors(op: str, backend: str) -> None:
    """In every position of the list, and without tokens. GPUs take such a value for -1."""
    call = _rich(op)
    for name in samples.INDEX_INPUTS & set(call.arguments):
        for value in (*BAD_INDICES, 11):
            for b, position in ((0, 0), (1, -1)):
                indices = call.arguments[name].clone()
                indices[b, position] = value
                wrong = with_arguments(call, **{name: indices})
                if backend in GPU_BACKENDS:
                    indices = indices.clone()
                    indices[b, position] = -1
                    for got, want in zip(
                        run(wrong, backend), run(with_arguments(call, **{name: indices}), backend), strict=True
                    ):
                        assert torch.equal(got, want), f"{name} {value}"
                    continue
                with pytest.raises(IndexError):
                    run(wrong, backend)
                with pytest.raises(IndexError):
                    run_op(wrong)
        nothing = make(op, RICHEST[op], Sizes(tokens=0, channels=8))
        if nothing.arguments[name].numel() == 0:
            continue  # an index per token, and there is no token
        wrong = with_arguments(nothing, **{name: torch.zeros_like(nothing.arguments[name])})
        if backend in GPU_BACKENDS:
            no_entry = with_arguments(nothing, **{name: torch.full_like(nothing.arguments[name], -1)})
            for got, want in zip(run(wrong, backend), run(no_entry, backend), strict=True):
                assert torch.equal(got, want)
        else:
            with pytest.raises(IndexError):
                run(wrong, backend)
    _assert_good_call_works(op)


FLOATING = {op: [(a, k) for a, k in _of_kind(op, TensorKind) if k.dtypes is described.FLOATS] for op in OPS}
# What GPU kernels convert to float32 themselves, beside features that are narrower anyway.
CONVERTED = (("attention_scores", "lse"), ("repulsion_sample", "positions"), ("repulsion_sample", "energy"))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend in GPU_BACKENDS])
@pytest.mark.parametrize("op", [op for op in OPS if FLOATING[op]])
def test_float64_is_refused(op: str, backend: str) -> None:
    """By name, in whichever tensor it is; those that have the dtype of another one change with it."""
    call = _rich(op)
    for name in (name for name, kind in FLOATING[op] if not kind.like):
        alike = [name, *(other for other, kind in FLOATING[op] if kind.like == name)]
        wide = with_arguments(call, **{other: call.arguments[other].double() for other in alike})
        if (op, name) in CONVERTED:
            for got, want in zip(run(wide, backend), run(call, backend), strict=True):
                assert torch.equal(got, want), name
        else:
            expected = rf"tokenprune::{op}: {name} must be float16, bfloat16 or float32 on a GPU \(.*\), got float64"
            with pytest.raises((RuntimeError, TypeError), match=expected):
                run(wide, backend)


@over_backends
@pytest.mark.parametrize("op", OPTIONS)
def test_options_must_be_strings(op: str, backend: str) -> None:
    for name in OPTIONS[op]:
        for value in (None, 3, ["mean"]):
            with pytest.raises((ValueError, TypeError), match=rf"tokenprune::{op}: {name} must be "):
                run(with_arguments(make(op), **{name: value}), backend)


@over_backends
def test_attention_names_sizes_that_do_not_fit(backend: str) -> None:
    for op in ("cross_attention_scores", "attention_entropy"):
        good = make(op).arguments

        def wrong(op=op, good=good, **changed) -> None:
            run(Call(op, {**good, **changed}), backend)

        with pytest.raises(ValueError, match=r"key must have shape \[B, Hkv, N, D\] = \[2, any, any, 72\]"):
            wrong(key=good["key"][..., :-1])
        with pytest.raises(ValueError, match="multiple of Hkv = 2, got 3"):
            wrong(query=good["query"][:, :3])
        with pytest.raises(ValueError, match="multiple of Hkv = 0"):
            wrong(key=good["key"][:, :0])
        with pytest.raises(TypeError, match="dtype of query"):
            wrong(key=good["key"].half())
        with pytest.raises(ValueError, match="D >= 1"):
            wrong(query=good["query"][..., :0], key=good["key"][..., :0])


@over_backends
def test_gather_compact_names_what_does_not_fit(backend: str) -> None:
    t, indices = torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)
    faults = [
        ({"tensors": [t, t], "dims": [1], "batch_dims": [0, 0]}, "dims must have one entry per tensor"),
        ({"tensors": [t], "dims": [1], "batch_dims": [0, 0]}, "batch_dims must have one entry per tensor"),
        ({"tensors": [t], "dims": [3], "batch_dims": [0]}, r"dims\[0\] must lie in"),
        ({"tensors": [t], "dims": [1], "batch_dims": [-4]}, r"batch_dims\[0\] must lie in"),
        ({"tensors": [t], "dims": [2**62], "batch_dims": [0]}, r"dims\[0\] must lie in"),
        ({"tensors": [t], "dims": [0], "batch_dims": [0]}, r"dims\[0\] must differ from batch_dims\[0\]"),
        ({"tensors": [t], "dims": [-3], "batch_dims": [0]}, r"dims\[0\] must differ from batch_dims\[0\]"),
        ({"tensors": [t], "dims": [0], "batch_dims": [1]}, r"tensors\[0\] must have size B = 2"),
        ({"tensors": [t, t[:1]], "dims": [1, 1], "batch_dims": [0, 0]}, r"tensors\[1\] must have size B = 2"),
        ({"tensors": [torch.zeros(())], "dims": [0], "batch_dims": [0]}, "tensors|dims"),
        ({"tensors": [t.to("meta")], "dims": [1], "batch_dims": [0]}, r"tensors\[0\] must be on cpu"),
    ]
    for arguments, message in faults:
        call = Call("gather_compact", {**arguments, "indices": indices})
        with pytest.raises(ValueError, match=f"tokenprune::gather_compact: {message}"):
            run(call, backend)
        with pytest.raises(RuntimeError, match="tokenprune::gather_compact: "):
            run_op(call)
    _assert_good_call_works("gather_compact")


def test_other_devices_than_the_backends_are_refused() -> None:
    for op in OPS:
        call = samples.map_tensors(make(op), lambda _, t: t.to("meta"))
        args, kwargs = samples.positional(call)
        with pytest.raises(tp.BackendUnavailableError, match=r"inputs are on meta|library is not loaded"):
            getattr(tp, op)(*args, **kwargs, backend="cpu")


def _values(call: Call) -> tuple[Any, ...]:
    args, kwargs = samples.positional(call)
    return tuple(described.OPS[call.op].bind(args, kwargs))


@pytest.mark.parametrize(("op", "name"), samples.SAMPLES, ids=samples.SAMPLE_IDS)
def test_the_fast_check_accepts_good_calls(op: str, name: str) -> None:
    assert good_sizes(described.OPS[op], _values(make(op, name)))


@over_ops
def test_the_fast_check_accepts_no_wrong_call(op: str) -> None:
    for fault, _, call in wrong_calls(op):
        try:
            accepted = good_sizes(described.OPS[op], _values(call))
        except ValueError:  # a rule that says itself what is wrong
            continue
        assert accepted is None, fault
