"""gather_compact: layouts, strides, dtypes, many tensors at once, padding, index errors, and its derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import tokenprune_kernels as tp
from testing.cases import BACKENDS, GPU_BACKENDS, over_backends

op = torch.ops.tokenprune.gather_compact
needs_binary = pytest.mark.skipif("cpu" not in BACKENDS, reason="without the compiled library only the reference runs")

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
over_compiled = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
INDICES = torch.tensor([[0, 2, 3, -1], [4, 1, -1, -1]])


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor: equality for dtypes that have no comparison, and for NaN."""
    return t.contiguous().view(-1).view(torch.uint8)


def loop_over_entries(t: Tensor, indices: Tensor, dim: int, batch_dim: int) -> Tensor:
    """The definition, entry by entry: the slices that belong to sample b and token indices[b, n]."""
    shape = list(t.shape)
    shape[dim] = indices.shape[1]
    out = torch.zeros(shape, dtype=t.dtype)
    dim, batch_dim = dim % t.dim(), batch_dim % t.dim()
    for b, row in enumerate(indices.tolist()):
        for n, token in enumerate(row):
            if token >= 0:
                to: list[slice | int] = [slice(None)] * t.dim()
                to[batch_dim], to[dim] = b, n
                source = list(to)
                source[dim] = token
                out[tuple(to)] = t[tuple(source)]
    return out


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).to(dtype)


@over_backends
class TestLayouts:
    @pytest.mark.parametrize(
        ("make", "dim", "batch_dim"),
        [
            pytest.param(lambda: some(2, 5, 6), 1, 0, id="hidden [B,T,C]"),
            pytest.param(lambda: some(2, 5, 80), 1, 0, id="hidden, odd width"),
            pytest.param(lambda: some(2, 5), 1, 0, id="positions [B,T]"),
            pytest.param(lambda: some(3, 2, 5), 2, 1, id="positions [3,B,T]"),
            pytest.param(lambda: some(2, 4, 5, 8), 2, 0, id="cache [B,H,T,D]"),
            pytest.param(lambda: some(2, 5, 4, 8).transpose(1, 2), 2, 0, id="cache, view of [B,T,H,D]"),
            pytest.param(lambda: some(2, 4, 8, 5).transpose(2, 3), 2, 0, id="cache, channels strided"),
            pytest.param(lambda: some(5, 2, 6), 0, 1, id="sequence first [T,B,C]"),
            pytest.param(lambda: some(5, 3, 2), 0, 2, id="batch last [T,C,B]"),
            pytest.param(lambda: some(5, 2), 0, 1, id="[T,B]"),
            pytest.param(lambda: some(2, 5, 5), 2, 0, id="attention mask columns [B,T,T]"),
            pytest.param(lambda: some(2, 5, 6)[..., ::2], 1, 0, id="every other channel"),
            pytest.param(lambda: some(2, 10, 6)[:, ::2], 1, 0, id="every other token"),
            pytest.param(lambda: some(7, 5, 6)[3:5, :, 1:4], 1, 0, id="offset window"),
            pytest.param(lambda: some(1, 5, 6).expand(2, 5, 6), 1, 0, id="expanded batch"),
            pytest.param(lambda: some(2, 1, 6).expand(2, 5, 6), 1, 0, id="expanded tokens"),
            pytest.param(lambda: some(2, 5, 1).expand(2, 5, 6), 1, 0, id="expanded channels"),
            pytest.param(lambda: some(3, 2, 2, 5, 2, 3).permute(1, 5, 0, 3, 4, 2), 3, 0, id="six dimensions permuted"),
            pytest.param(lambda: some(2, 5, 0), 1, 0, id="no channels"),
            pytest.param(lambda: some(0, 2, 5), 2, 1, id="no planes"),
        ],
    )
    @pytest.mark.parametrize("negative", [False, True], ids=["dims from the front", "dims from the back"])
    def test_layout(self, backend, make, dim, batch_dim, negative):
        t = make()
        dims, batch_dims = ([dim - t.dim()], [batch_dim - t.dim()]) if negative else ([dim], [batch_dim])
        (kept,) = tp.gather_compact([t], INDICES, dims=dims, batch_dims=batch_dims, backend=backend)
        assert kept.is_contiguous()
        assert kept.dtype == t.dtype
        assert torch.equal(kept, loop_over_entries(t, INDICES, dim, batch_dim))

    def test_batch_dims_default_to_the_first(self, backend):
        tensors = [some(2, 5, 3), some(2, 5)]
        kept = tp.gather_compact(tensors, INDICES, dims=[1, -1], backend=backend)
        for k, t in zip(kept, tensors, strict=True):
            assert torch.equal(k, loop_over_entries(t, INDICES, 1, 0))

    def test_strided_and_expanded_indices(self, backend):
        t = some(2, 5, 3)
        wide = torch.full((2, 8), 99)
        wide[:, ::2] = INDICES
        for indices in (wide[:, ::2], INDICES.t().contiguous().t(), INDICES[:1].expand(2, 4)):
            (kept,) = tp.gather_compact([t], indices, dims=[1], backend=backend)
            assert torch.equal(kept, loop_over_entries(t, indices, 1, 0))

    def test_repeated_and_descending_indices(self, backend):
        t = some(1, 5, 3)
        indices = torch.tensor([[4, 3, 3, 0, 1, 2, -1, 2]])
        (kept,) = tp.gather_compact([t], indices, dims=[1], backend=backend)
        assert torch.equal(kept, loop_over_entries(t, indices, 1, 0))

    @pytest.mark.parametrize(("batch", "tokens", "k"), [(0, 5, 4), (2, 5, 0), (2, 0, 3), (0, 0, 0)])
    def test_empty(self, backend, batch, tokens, k):
        indices = torch.full((batch, k), -1)
        kept = tp.gather_compact([some(batch, tokens, 3), some(batch, tokens)], indices, dims=[1, 1], backend=backend)
        assert [list(t.shape) for t in kept] == [[batch, k, 3], [batch, k]]
        assert all(t.eq(0).all() for t in kept)

    def test_no_tensors(self, backend):
        assert list(tp.gather_compact([], INDICES, dims=[], backend=backend)) == []

    def test_many_tensors(self, backend):
        """Hundreds of tensors of different sizes and dtypes in one call, large enough for several threads."""
        indices = torch.stack([torch.randperm(300)[:100].sort().values for _ in range(2)])
        indices[1, 60:] = -1
        count = 70 if backend == "triton" else 200  # interpreted, that is slow
        tensors = [torch.randint(0, 100, (2, 1 + i % 3, 300, 1 + 7 * (i % 5))).to(DTYPES[i % 12]) for i in range(count)]
        dims = [2] * len(tensors)
        kept = tp.gather_compact(tensors, indices, dims=dims, backend=backend)
        for k, t in zip(kept, tensors, strict=True):
            safe = indices.clamp(min=0)[:, None, :, None].expand(k.shape)
            want = torch.where(indices[:, None, :, None] < 0, torch.zeros((), dtype=t.dtype), t.gather(2, safe))
            assert torch.equal(k, want)


@over_compiled
@pytest.mark.parametrize("stored", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_dtype(backend, stored):
    size = torch.empty((), dtype=stored).element_size()
    raw = torch.randint(0, 2 if stored == torch.bool else 256, (2, 5, 3 * size), dtype=torch.uint8)
    t = raw.view(stored)
    raw_kept = loop_over_entries(raw, INDICES, 1, 0)
    for source in (t, t.transpose(0, 1).contiguous().transpose(0, 1), t.transpose(1, 2).contiguous().transpose(1, 2)):
        (kept,) = tp.gather_compact([source], INDICES, dims=[1], backend=backend)
        assert kept.dtype == stored
        assert torch.equal(bits(kept), bits(raw_kept))


@over_backends
def test_lazily_conjugated_and_negated_views(backend):
    t = torch.randn(2, 5, 3, dtype=torch.complex64)
    for view in (t.conj(), t.conj().imag):
        (kept,) = tp.gather_compact([view], INDICES, dims=[1], backend=backend)
        assert torch.equal(kept, loop_over_entries(view.resolve_conj().resolve_neg(), INDICES, 1, 0))


@over_compiled
@settings(deadline=None, max_examples=200, print_blob=True)
@given(data=st.data())
def test_random_shapes_and_strides(backend, data):
    batch, tokens, k = (data.draw(st.sampled_from(sizes)) for sizes in ([1, 2, 3], [1, 2, 7, 40], [0, 1, 3, 20]))
    tensors, dims, batch_dims = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        rank = data.draw(st.integers(2, 5))
        dim, batch_dim = data.draw(st.permutations(range(rank)))[:2]
        shape = [data.draw(st.sampled_from([1, 2, 3, 16])) for _ in range(rank)]
        shape[dim], shape[batch_dim] = tokens, batch
        order = data.draw(st.permutations(range(rank)))
        steps = [data.draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
        base = some(*(shape[d] * steps[d] for d in order), dtype=data.draw(st.sampled_from(DTYPES[:12])))
        strided = base[tuple(slice(None, None, steps[d]) for d in order)]
        tensors.append(strided.permute([order.index(d) for d in range(rank)]))
        dims.append(dim)
        batch_dims.append(batch_dim)
    indices = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(-1, tokens - 1), min_size=k, max_size=k), min_size=batch, max_size=batch)
        ),
        dtype=torch.int64,
    ).view(batch, k)
    kept = tp.gather_compact(tensors, indices, dims=dims, batch_dims=batch_dims, backend=backend)
    for got, t, dim, batch_dim in zip(kept, tensors, dims, batch_dims, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, loop_over_entries(t, indices, dim, batch_dim))


@needs_binary
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_are_shared_among_threads(threads):
    tensors = [some(2, 4, 500, 64), some(2, 500), some(3, 2, 500), some(2, 500, 700)]
    indices = torch.stack([torch.randperm(500)[:333] for _ in range(2)])
    arguments = {"dims": [2, 1, 2, 1], "batch_dims": [0, 0, 1, 0]}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept = tp.gather_compact(tensors, indices, **arguments)
    finally:
        torch.set_num_threads(before)
    for k, want in zip(kept, tp.reference.gather_compact(tensors, indices, **arguments), strict=True):
        assert torch.equal(k, want)


@over_backends
class TestErrors:
    @pytest.mark.parametrize("bad", [5, -2, 2**40, -(2**40)])
    def test_index_value_outside(self, backend, bad):
        indices = INDICES.clone()
        indices[1, 1] = bad
        if backend in GPU_BACKENDS:  # never touched: treated as -1
            (kept,) = tp.gather_compact([some(2, 5, 3)], indices, dims=[1], backend=backend)
            assert torch.equal(kept, loop_over_entries(some(2, 5, 3), INDICES, 1, 0) * (indices == INDICES)[..., None])
            return
        with pytest.raises(IndexError, match=r"\[-1, 5\)"):
            tp.gather_compact([some(2, 5, 3)], indices, dims=[1], backend=backend)

    def test_index_must_fit_the_shortest_tensor(self, backend):
        if backend in GPU_BACKENDS:
            long, short = tp.gather_compact([some(2, 5), some(2, 4)], INDICES, dims=[1, 1], backend=backend)
            assert torch.equal(long, loop_over_entries(some(2, 5), INDICES, 1, 0))
            assert torch.equal(short, loop_over_entries(some(2, 4), INDICES.where(INDICES < 4, -1), 1, 0))
            return
        with pytest.raises(IndexError, match=r"\[-1, 4\)"):
            tp.gather_compact([some(2, 5), some(2, 4)], INDICES, dims=[1, 1], backend=backend)

    @pytest.mark.parametrize(
        ("tensors", "arguments", "error", "message"),
        [
            ([some(2, 5)], {"dims": [2]}, ValueError, r"dims\[0\] must lie in \[-2, 2\)"),
            ([some(2, 5)], {"dims": [1], "batch_dims": [-3]}, ValueError, r"batch_dims\[0\] must lie"),
            ([some(2, 5)], {"dims": [0]}, ValueError, r"dims\[0\] must differ"),
            ([some(2, 5)], {"dims": [1, 1]}, ValueError, "one entry per tensor"),
            ([some(2, 5)], {"dims": [1], "batch_dims": []}, ValueError, "one entry per tensor"),
            ([some(3, 5)], {"dims": [1]}, ValueError, "size B = 2"),
            ([[1]], {"dims": [1]}, TypeError, r"tensors\[0\] must be a tensor"),
        ],
    )
    def test_arguments(self, backend, tensors, arguments, error, message):
        with pytest.raises(error, match=message):
            tp.gather_compact(tensors, INDICES, **arguments, backend=backend)
        if isinstance(tensors[0], Tensor):
            with pytest.raises(RuntimeError, match=message):
                op(tensors, INDICES, **arguments)


class TestDerivatives:
    DIMS, BATCH_DIMS = [1, 1, 2], [0, 0, 1]

    def inputs(self, requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=requires_grad)
        planes = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=requires_grad)
        return hidden, some(2, 5, dtype=torch.int64), planes

    def gather(self, hidden: Tensor, positions: Tensor, planes: Tensor) -> list[Tensor]:
        return list(op([hidden, positions, planes], INDICES, dims=self.DIMS, batch_dims=self.BATCH_DIMS))

    def floats(self, positions: Tensor):
        return lambda hidden, planes: tuple(self.gather(hidden, positions, planes)[::2])

    def test_gradcheck(self):
        hidden, positions, planes = self.inputs()
        f = self.floats(positions)
        assert torch.autograd.gradcheck(f, (hidden, planes), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, (hidden, planes))

    @over_backends
    def test_gradcheck_of_every_backend(self, backend):
        """Tensors of two lengths, and gradients that arrive expanded."""
        hidden, positions, planes = self.inputs()
        longer = torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True)
        indices = INDICES.where(INDICES < 4, -1)

        def f(*floats: Tensor) -> tuple[Tensor, ...]:
            kept = tp.gather_compact(
                [*floats, positions], indices, dims=[1, 2, 1, 1], batch_dims=[0, 1, 0, 0], backend=backend
            )
            return tuple(kept[:3])

        fast = backend == "triton"  # one direction instead of all entries: interpreted, those take minutes
        assert torch.autograd.gradcheck(f, (hidden, planes, longer), fast_mode=fast)
        assert torch.autograd.gradgradcheck(f, (hidden, planes, longer), fast_mode=fast)
        sum(k.sum() for k in f(hidden, planes, longer)).backward()
        for t, batch_dim, dim in ((hidden, 0, 1), (planes, 1, 2), (longer, 0, 1)):
            taken = t.grad.movedim((batch_dim, dim), (0, 1)).flatten(2)
            for b in range(2):
                kept = set(indices[b].tolist()) - {-1}
                assert [bool((row == float(i in kept)).all()) for i, row in enumerate(taken[b])] == [True] * len(
                    taken[b]
                )

    def test_integers_in_the_list_have_no_gradient(self):
        kept = self.gather(*self.inputs())
        assert [k.requires_grad for k in kept] == [True, False, True]

    def test_only_what_requires_grad_gets_a_graph(self):
        hidden, positions, planes = self.inputs()
        kept = self.gather(hidden, positions, planes.detach())
        assert [k.requires_grad for k in kept] == [True, False, False]
        assert all(not k.requires_grad for k in self.gather(*self.inputs(requires_grad=False)))
        with torch.no_grad():
            assert all(not k.requires_grad for k in self.gather(hidden, positions, planes))

    def test_dropped_tokens_get_zero(self):
        hidden, positions, planes = self.inputs()
        self.gather(hidden, positions, planes)[0].sum().backward()
        kept = torch.zeros(2, 5)
        kept[0, [0, 2, 3]] = kept[1, [4, 1]] = 1
        assert torch.equal(hidden.grad, kept[..., None].expand(2, 5, 3).double())
        assert planes.grad is None

    def test_torch_func(self):
        hidden, positions, planes = self.inputs(requires_grad=False)

        def loss(h: Tensor) -> Tensor:
            return (self.gather(h, positions, planes)[0] ** 2).sum()

        want = torch.zeros(2, 5, 1, dtype=torch.float64)
        want[0, [0, 2, 3]] = want[1, [4, 1]] = 2
        assert torch.equal(torch.func.grad(loss)(hidden), want * hidden)
        for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
            second = hessian(loss)(hidden).reshape(30, 30)
            assert torch.equal(second, torch.diag(want.expand(2, 5, 3).flatten()))

    def test_gradient_under_vmap(self):
        hidden = torch.randn(4, 2, 5, 3, dtype=torch.float64)
        grad = torch.func.grad(lambda h: (op([h], INDICES, dims=[1])[0] ** 2).sum())
        assert torch.equal(torch.func.vmap(grad)(hidden), torch.stack([grad(h) for h in hidden]))

    def test_forward_mode(self):
        hidden, positions, planes = self.inputs(requires_grad=False)
        with forward_ad.dual_level():
            tangent = torch.randn_like(hidden)
            kept = self.gather(forward_ad.make_dual(hidden, tangent), positions, planes)
            moved = [forward_ad.unpack_dual(k).tangent for k in kept]
        assert moved[1] is None
        assert moved[2] is None
        assert torch.equal(moved[0], op([tangent], INDICES, dims=[1])[0])

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled_gradient(self, dynamic):
        hidden, positions, planes = self.inputs()

        def run(h: Tensor, p: Tensor, q: Tensor) -> list[Tensor]:
            return [2 * t for t in tp.gather_compact([h, p, q], INDICES, dims=self.DIMS, batch_dims=self.BATCH_DIMS)]

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for f in (run, compiled):
            hidden.grad = planes.grad = None
            kept = f(hidden, positions, planes)
            assert [k.requires_grad for k in kept] == [True, False, True]
            (kept[0].square().sum() + kept[2].sum()).backward()
            if f is run:
                want = hidden.grad, planes.grad
        assert torch.equal(hidden.grad, want[0])
        assert torch.equal(planes.grad, want[1])

    def test_opcheck(self):
        arguments = {"dims": self.DIMS, "batch_dims": self.BATCH_DIMS}
        torch.library.opcheck(op.default, (list(self.inputs()), INDICES), arguments)


class TestInverse:
    """The private op behind the gradient: for each token its slot among the kept ones."""

    @pytest.mark.parametrize("namespace", ["tokenprune", "tokenprune_emulated"])
    @pytest.mark.parametrize(
        ("indices", "size", "slots"),
        [
            ([[0, 2, 3, -1], [4, 1, -1, -1]], 5, [[0, -1, 1, 2, -1], [-1, 1, -1, -1, 0]]),
            ([[1, 1, 0, 1]], 2, [[2, 3]]),  # the last of several slots
            ([[-5, 9, 2, 2**62]], 3, [[-1, -1, 2]]),
            ([[]], 3, [[-1, -1, -1]]),
            ([[0, 1]], 0, [[]]),
        ],
    )
    def test_values(self, namespace, indices, size, slots):
        if namespace == "tokenprune_emulated" and not set(GPU_BACKENDS) & set(BACKENDS):
            pytest.skip("no C++ compiler")
        listed = torch.tensor(indices, dtype=torch.int64).view(len(indices), -1)
        want = torch.tensor(slots, dtype=torch.int64).view(len(slots), -1)
        invert = getattr(torch.ops, namespace)._invert_indices
        assert torch.equal(invert(listed, size), want)
        assert torch.equal(invert(listed.t().contiguous().t(), size), want)
        assert torch.equal(tp.reference._invert_indices(listed, size), want)

    def test_opcheck_and_vmap(self):
        invert = torch.ops.tokenprune._invert_indices
        torch.library.opcheck(invert.default, (INDICES, 5))
        stacked = torch.stack([INDICES, INDICES.flip(0)])
        assert torch.equal(torch.vmap(lambda i: invert(i, 5))(stacked), torch.stack([invert(i, 5) for i in stacked]))

    def test_wrong_arguments_are_named(self):
        for indices, size, name in ((INDICES[0], 5, "indices"), (INDICES.int(), 5, "indices"), (INDICES, -1, "size")):
            with pytest.raises(RuntimeError, match=f"tokenprune::_invert_indices: {name}"):
                torch.ops.tokenprune._invert_indices(indices, size)
