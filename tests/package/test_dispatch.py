"""What the PyTorch dispatcher is promised of every op: fakes, autograd, vmap, inference mode, compile, export."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tokenprune_kernels as tp
from testing import op_samples as samples
from testing.cases import BACKENDS, GPU_BACKENDS
from testing.op_samples import OPS, SAMPLE_IDS, SAMPLES, Call, Sizes, make, map_tensors, outputs, positional, run_op

over_samples = pytest.mark.parametrize(("op", "name"), SAMPLES, ids=SAMPLE_IDS)
over_ops = pytest.mark.parametrize("op", OPS)
# All sizes differ, so that torch.compile cannot take two of them for the same symbol.
DYNAMIC = (
    Sizes(batch=5, tokens=37, rows=13, channels=72, heads=8, kv_heads=4, k=9, listed=6),
    Sizes(batch=7, tokens=43, rows=11, channels=80, heads=24, kv_heads=12, k=17, listed=19),
)


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True, rtol=1e-5, atol=1e-5)


def _overload(op: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.tokenprune, op).default


@over_samples
def test_opcheck(op: str, name: str) -> None:
    args, kwargs = positional(make(op, name, Sizes(tokens=11, channels=8, k=4)))
    assert set(torch.library.opcheck(_overload(op), args, kwargs).values()) == {"SUCCESS"}


def test_opcheck_of_the_gradient() -> None:
    call = map_tensors(make("gather_compact"), lambda _, t: t.clone().requires_grad_() if t.is_floating_point() else t)
    args, kwargs = positional(call)
    assert set(torch.library.opcheck(_overload("gather_compact"), args, kwargs).values()) == {"SUCCESS"}


def _assert_same_metadata(fake: list[Tensor], real: list[Tensor]) -> None:
    def described(t: Tensor) -> tuple:  # an empty tensor is contiguous with any strides
        return t.shape, t.dtype, t.stride() if t.numel() else None

    assert list(map(described, fake)) == list(map(described, real))


@over_samples
def test_meta_tensors_give_the_real_shapes_dtypes_and_strides(op: str, name: str) -> None:
    for sizes in (Sizes(), Sizes(batch=0, tokens=1, k=3), Sizes(tokens=3, k=0, rows=1)):
        for dtype in (torch.bfloat16, torch.float64):
            call = make(op, name, sizes, dtype)
            meta = run_op(map_tensors(call, lambda _, t: t.to("meta")))
            assert all(m.is_meta for m in meta)
            _assert_same_metadata(meta, run_op(call))


@over_samples
def test_fake_tensors_give_the_real_shapes_dtypes_and_strides(op: str, name: str) -> None:
    call = make(op, name)
    transposed = map_tensors(call, lambda _, t: t.transpose(0, -1).contiguous().transpose(0, -1))
    for variant in (call, transposed):
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fakes = run_op(map_tensors(variant, lambda _, t, mode=mode: mode.from_tensor(t)))
        _assert_same_metadata(fakes, run_op(variant))


@over_ops
def test_fakes_refuse_what_the_op_refuses(op: str) -> None:
    call = make(op)
    first = next(iter(call.arguments))
    wrong = Call(op, {**call.arguments, first: [torch.zeros(())] if op == "gather_compact" else torch.zeros(1)})
    for variant in (wrong, map_tensors(wrong, lambda _, t: t.to("meta"))):
        with pytest.raises(RuntimeError, match=f"tokenprune::{op}: "):
            run_op(variant)


@over_samples
def test_inference_mode(op: str, name: str) -> None:
    want = run_op(make(op, name))
    with torch.inference_mode():
        got = run_op(make(op, name))
        assert all(g.is_inference() for g in got)
        assert_equal(got, want)


def _vmapped(call: Call, depth: int) -> tuple[list[Tensor], Iterator[tuple[tuple[int, ...], list[Tensor]]]]:
    """The op mapped `depth` times over stacked variants of its tensors, and the loop it has to equal."""
    mapped_sizes = (3, 2)[:depth]
    count = mapped_sizes[0] * (mapped_sizes[1] if depth == 2 else 1)
    names = [name for name, _, _ in samples.tensors(call)]
    stacked = [
        torch.stack([t.roll(i, -1) if t.is_floating_point() else t for i in range(count)]).unflatten(0, mapped_sizes)
        for _, t, _ in samples.tensors(call)
    ]

    def apply(*given: Tensor) -> tuple[Tensor, ...]:
        by_name = dict(zip(names, given, strict=True))
        return tuple(run_op(map_tensors(call, lambda n, _: by_name[n])))

    function = apply
    for _ in range(depth):
        function = torch.vmap(function)
    positions = [(i,) for i in range(3)] if depth == 1 else [(i, j) for i in range(3) for j in range(2)]
    return list(function(*stacked)), ((p, list(apply(*(s[p] for s in stacked)))) for p in positions)


@pytest.mark.parametrize("depth", [1, 2])
@over_samples
def test_vmap_equals_a_loop(op: str, name: str, depth: int) -> None:
    together, loop = _vmapped(make(op, name, Sizes(tokens=11, channels=8, k=4)), depth)
    for position, alone in loop:
        assert_equal([t[position] for t in together], alone)


@over_ops
def test_vmap_over_nothing(op: str) -> None:
    call = make(op, sizes=Sizes(tokens=11, channels=8, k=4))
    names = [name for name, _, _ in samples.tensors(call)]

    def apply(*given: Tensor) -> tuple[Tensor, ...]:
        by_name = dict(zip(names, given, strict=True))
        return tuple(run_op(map_tensors(call, lambda n, _: by_name[n])))

    together = torch.vmap(apply)(*(t.new_empty((0, *t.shape)) for _, t, _ in samples.tensors(call)))
    assert [t.shape for t in together] == [(0, *t.shape) for t in run_op(call)]


@over_ops
def test_vmap_over_one_argument_at_another_dimension(op: str) -> None:
    """The others are shared by all mapped calls."""
    call = make(op, list(samples.FACTORIES[op])[-1], Sizes(tokens=11, channels=8, k=4))
    for which, t, _ in list(samples.tensors(call)):
        stacked = torch.stack([t, t.flip(-1)], dim=-1)

        def apply(x: Tensor, which: str = which) -> tuple[Tensor, ...]:
            return tuple(run_op(map_tensors(call, lambda n, shared: x if n == which else shared)))

        together = torch.vmap(apply, in_dims=-1)(stacked)
        for i in range(2):
            assert_equal([out[i] for out in together], list(apply(stacked[..., i])))


def _gather_loss(*floats: Tensor, call: Call) -> tuple[Tensor, ...]:
    given = iter(floats)
    kept = run_op(map_tensors(call, lambda _, t: next(given) if t.is_floating_point() else t))
    return tuple(k for k in kept if k.is_floating_point())


def test_gradients_of_gather_compact() -> None:
    call = make("gather_compact", sizes=Sizes(tokens=5, channels=2, k=4, heads=2), dtype=torch.float64)
    floats = [t.clone().requires_grad_() for _, t, _ in samples.tensors(call) if t.is_floating_point()]
    assert torch.autograd.gradcheck(lambda *f: _gather_loss(*f, call=call), floats)
    assert torch.autograd.gradgradcheck(lambda *f: _gather_loss(*f, call=call), floats)
    expanded = torch.randn(1, 5, 1, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 3], [4, -1]])
    torch.ops.tokenprune.gather_compact([expanded.expand(2, 5, 3)], indices, dims=[1])[0].sum().backward()
    assert expanded.grad is not None
    assert expanded.grad.flatten().tolist() == [3.0, 0.0, 0.0, 3.0, 3.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_outputs_of_gather_compact_have_no_gradient(backend: str) -> None:
    a, b = torch.randn(1, 4, 2, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    kept = tp.gather_compact([a, b], torch.tensor([[1, 2]]), dims=[1, 1], backend=backend)
    kept[0].sum().backward()
    assert a.grad is not None
    assert a.grad[0, :, 0].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert b.grad is None or not bool(b.grad.any())


@over_ops
def test_compile_without_graph_breaks_or_recompiles(op: str) -> None:
    """The Python function, with dynamic shapes: a second call of other sizes reuses the graph."""
    torch._dynamo.reset()

    def call_op(args: tuple, kwargs: dict) -> list[Tensor]:
        return outputs(getattr(tp, op)(*args, **kwargs))

    function = torch.compile(call_op, fullgraph=True, dynamic=True, backend="aot_eager")
    name = list(samples.FACTORIES[op])[-1]
    for i, sizes in enumerate(DYNAMIC):
        call = make(op, name, sizes)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = function(*positional(call))
        args, kwargs = positional(call)
        want = outputs(getattr(tp, op)(*args, **kwargs))
        _assert_same_metadata(got, want)
        assert_equal(got, want)


def test_inductor_compiles_all_ops_in_one_graph() -> None:
    torch._dynamo.reset()

    def every(calls: list[tuple]) -> list[list[Tensor]]:
        return [outputs(getattr(tp, op)(*args, **kwargs)) for op, args, kwargs in calls]

    function = torch.compile(every, fullgraph=True, dynamic=True)
    for sizes in DYNAMIC:
        calls = [(op, *positional(make(op, sizes=sizes))) for op in OPS]
        for op, got, want in zip(OPS, function(calls), every(calls), strict=True):
            try:
                assert_equal(got, want)
            except AssertionError as error:
                raise AssertionError(f"compiled {op} differs: {error}") from None


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in GPU_BACKENDS])
def test_backend_choice_inside_and_around_compiled_code(backend: str) -> None:
    scores = torch.randn(2, 9)
    want = tp.select_topk(scores, 5)

    def inside(x: Tensor) -> tuple[Tensor, Tensor]:
        with tp.use_backend(backend):
            return tp.select_topk(x, 5)

    def argument(x: Tensor) -> tuple[Tensor, Tensor]:
        return tp.select_topk(x, 5, backend=backend)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return tp.select_topk(x, 5)

    for function in (inside, argument, plain):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert_equal(list(compiled(scores)), list(want))
        with tp.use_backend(backend):
            assert_equal(list(compiled(scores)), list(want))


def test_use_backend_is_guarded_by_compiled_code() -> None:
    """Code compiled outside use_backend does not ignore a use_backend around a later call."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: tp.select_topk(x, 2), fullgraph=True, backend="eager")
    compiled(torch.randn(1, 4))
    with tp.use_backend("cuda"), pytest.raises(Exception, match="'cuda' was asked for"):
        compiled(torch.randn(1, 4))
    compiled(torch.randn(1, 4))


class Pruner(torch.nn.Module):
    """Attention scores, top-k, and compaction of the hidden states: what a model would export."""

    def forward(self, query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores, _, _ = tp.cross_attention_scores(query, key, head_reduction="mean", query_reduction="max")
        indices, _ = tp.select_topk(scores, 4)
        return tp.gather_compact([hidden], indices, dims=[1])[0], indices


def _pruner_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    a = make("cross_attention_scores", sizes=Sizes(batch=3, tokens=tokens, channels=8)).arguments
    return a["query"], a["key"], torch.arange(3.0 * tokens).view(3, tokens, 1) * torch.ones(5)


def _exported_pruner() -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=8, max=512)
    shapes = {"query": {}, "key": {2: tokens}, "hidden": {1: tokens}}
    return torch.export.export(Pruner(), _pruner_inputs(16), dynamic_shapes=shapes)


def test_export_of_a_pruner(tmp_path) -> None:
    program = _exported_pruner()
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {f"tokenprune.{op}.default" for op in ("cross_attention_scores", "select_topk", "gather_compact")} <= called
    torch.export.save(program, tmp_path / "pruner.pt2")
    loaded = torch.export.load(tmp_path / "pruner.pt2").module()
    for tokens in (16, 29):
        assert_equal(list(loaded(*_pruner_inputs(tokens))), list(Pruner()(*_pruner_inputs(tokens))))


def test_aot_inductor_package_of_a_pruner(tmp_path) -> None:
    """The most expensive test here: a C++ compilation of about 20 seconds."""
    package = torch._inductor.aoti_compile_and_package(_exported_pruner(), package_path=str(tmp_path / "pruner.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for tokens in (16, 29):
        assert_equal(list(loaded(*_pruner_inputs(tokens))), list(Pruner()(*_pruner_inputs(tokens))))


def test_ops_run_from_many_threads_at_once() -> None:
    calls = [make(op, name, Sizes(tokens=19, channels=16, k=5)) for op, name in SAMPLES]
    want = [run_op(call) for call in calls]
    failures: list[str] = []

    def work(shift: int) -> None:
        for i in range(len(calls)):
            at = (i + shift) % len(calls)
            for g, w in zip(run_op(calls[at]), want[at], strict=True):
                if not torch.equal(g.nan_to_num(), w.nan_to_num()):
                    failures.append(calls[at].op)

    threads = [threading.Thread(target=work, args=(7 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
