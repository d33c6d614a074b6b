"""gather_compact on the CUDA emulator: launches, access widths, the table's limits, its planner, the gradient."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR
from testing.process import printed

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None


def gather(tensors: list[Tensor], indices: Tensor, **arguments) -> list[Tensor]:
    return list(tp.gather_compact(tensors, indices, **arguments, backend="emulator"))


def kernels() -> list[str]:
    return [launch["kernel"] for launch in module.take_launches()]


def assert_equals_reference(tensors: list[Tensor], indices: Tensor, **arguments) -> list[Tensor]:
    got = gather(tensors, indices, **arguments)
    for g, want in zip(got, tp.reference.gather_compact(tensors, indices, **arguments), strict=True):
        assert torch.equal(g, want)
    return got


def model_state(layers: int = 28, tokens: int = 40) -> tuple[list[Tensor], list[int], list[int]]:
    """What pruning keeps of a decoder: hidden states, multimodal positions, a mask and every layer's cache."""
    caches = [torch.randn(2, 2, tokens, 16).half() for _ in range(2 * layers)]
    tensors = [torch.randn(2, tokens, 48).bfloat16(), torch.arange(6 * tokens).view(3, 2, tokens),
               torch.rand(2, tokens) < 0.5, *caches]  # fmt: skip
    return tensors, [1, 2, 1] + [2] * len(caches), [0, 1, 0] + [0] * len(caches)


def kept(batch: int, tokens: int, k: int) -> Tensor:
    indices = torch.stack([torch.randperm(tokens)[:k].sort().values for _ in range(batch)])
    indices[-1, k - k // 4 :] = -1
    return indices


# --- launches -------------------------------------------------------------------------------------------------------


def test_a_whole_model_is_one_launch():
    tensors, dims, batch_dims = model_state()
    assert_equals_reference(tensors, kept(2, 40, 11), dims=dims, batch_dims=batch_dims)
    assert kernels() == ["gather_compact_kernel"]


def test_the_gradient_of_a_whole_model_is_two_launches():
    tensors, dims, batch_dims = model_state()
    indices = kept(2, 40, 11)
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    got = gather(leaves, indices, dims=dims, batch_dims=batch_dims)
    module.take_launches()
    weights = [torch.randn_like(g) for g in got if g.requires_grad]
    torch.autograd.backward([g for g in got if g.requires_grad], weights)
    assert kernels() == ["invert_indices_kernel", "gather_compact_kernel"]
    for leaf, dim, grad in zip([leaf for leaf in leaves if leaf.requires_grad], [1] + [2] * 56, weights, strict=True):
        want = torch.zeros_like(leaf)
        for b in range(2):
            for n, token in enumerate(indices[b].tolist()):
                if token >= 0:
                    want[b].select(dim - 1, token).copy_(grad[b].select(dim - 1, n))
        assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize(("count", "launches"), [(0, 0), (1, 1), (108, 1), (109, 2), (250, 3)])
def test_tensors_of_one_geometry_fill_a_table(count, launches):
    indices = kept(1, 6, 3)
    assert_equals_reference([torch.randn(1, 6, 4) for _ in range(count)], indices, dims=[1] * count)
    assert [launch["dependent"] for launch in module.take_launches()] == [number > 0 for number in range(launches)]


@pytest.mark.parametrize(("count", "launches"), [(16, 1), (17, 2), (33, 3)])
def test_geometries_fill_a_table(count, launches):
    assert_equals_reference([torch.randn(1, 6, 4 * (i + 1)) for i in range(count)], kept(1, 6, 3), dims=[1] * count)
    assert len(kernels()) == launches


def test_loops_fill_a_table():
    """Eight dimensions that do not collapse: five tensors of 8 loops fit beside each other, the sixth does not."""
    shape = [2, 3, 1, 2, 1, 2, 2, 2, 2, 2]
    tensors = [
        torch.randn([i + 2 if d == 3 else s + 1 for d, s in enumerate(shape)])[:2, :2, :, :, :, ::2] for i in range(9)
    ]
    tensors = [t.permute(0, 3, 2, 1, 5, 4, 7, 6, 9, 8) for t in tensors]
    indices = torch.tensor([[1, -1, 0], [0, 1, 1]])
    (tables, loops) = zip(*[(t, g["loops"]) for t in plan(tensors, indices, [1] * 9) for g in t["groups"]], strict=True)
    assert max(loops) >= 8
    assert_equals_reference(tensors, indices, dims=[1] * len(tensors))
    assert len(kernels()) == len({id(t) for t in tables}) > 1


@pytest.mark.parametrize(("sm_count", "blocks"), [(1, 10), (10, 20), (200, 40)])
def test_few_vectors_are_spread_over_the_multiprocessors(sm_count, blocks):
    """40 rows of 256 vectors: 1024, 512 or 256 of them per block."""
    module.settings().sm_count = sm_count
    assert_equals_reference([torch.randn(1, 50, 1024)], kept(1, 50, 40), dims=[1])
    assert [launch["grid"] for launch in module.take_launches()] == [(blocks, 1, 1)]


def test_schedules_give_the_same_bits():
    tensors, dims, batch_dims = model_state(layers=2)
    indices = kept(2, 40, 11)
    results = []
    for schedule in (module.Schedule.forward, module.Schedule.reversed, module.Schedule.shuffled):
        module.settings().schedule = schedule
        slots = torch.ops.tokenprune_emulated._invert_indices(indices, 5000)
        results.append([*gather(tensors, indices, dims=dims, batch_dims=batch_dims), slots])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# --- the table ------------------------------------------------------------------------------------------------------


def inputs_of(tensors: list[Tensor], outputs: list[Tensor], dims: list[int], batch_dims: list[int] | None = None):
    return [
        module.CompactInput(
            t.data_ptr(), o.data_ptr(), list(t.shape), list(t.stride()), t.element_size(), dim, batch_dim
        )
        for t, o, dim, batch_dim in zip(tensors, outputs, dims, batch_dims or [0] * len(dims), strict=True)
    ]


def outputs_for(tensors: list[Tensor], k: int, dims: list[int]) -> list[Tensor]:
    """Poisoned."""
    shapes = [[k if d == dim else s for d, s in enumerate(t.shape)] for t, dim in zip(tensors, dims, strict=True)]
    return [
        torch.full((math.prod(shape) * t.element_size(),), 0x5A, dtype=torch.uint8).view(t.dtype).view(shape)
        for t, shape in zip(tensors, shapes, strict=True)
    ]


def plan(tensors: list[Tensor], indices: Tensor, dims: list[int], batch_dims: list[int] | None = None):
    outputs = outputs_for(tensors, indices.shape[1], dims)
    return module.plan_compact(
        inputs_of(tensors, outputs, dims, batch_dims), indices.data_ptr(), indices.stride(), indices.shape[1],
        module.DeviceLimits(), module.COMPACT_VECTORS,
    )  # fmt: skip


def aligned(count: int, offset: int, dtype: torch.dtype) -> Tensor:
    """`count` elements that begin `offset` bytes after a multiple of 16."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2, (count * size + 64,), dtype=torch.uint8)
    begin = -raw.data_ptr() % 16 + offset
    return raw[begin : begin + count * size].view(dtype)


@pytest.mark.parametrize(
    ("make", "width"),
    [
        pytest.param(lambda: aligned(2 * 6 * 16, 0, torch.float16).view(2, 6, 16), 16, id="aligned rows of 32 bytes"),
        pytest.param(lambda: aligned(2 * 6 * 16, 8, torch.float16).view(2, 6, 16), 8, id="base at 8"),
        pytest.param(lambda: aligned(2 * 6 * 16, 4, torch.float32).view(2, 6, 16), 4, id="base at 4"),
        pytest.param(lambda: aligned(2 * 6 * 16, 2, torch.float16).view(2, 6, 16), 2, id="base at 2"),
        pytest.param(lambda: aligned(2 * 6 * 16, 1, torch.uint8).view(2, 6, 16), 1, id="base at 1"),
        pytest.param(lambda: aligned(2 * 6 * 20, 0, torch.float16).view(2, 6, 20), 8, id="rows of 40 bytes"),
        pytest.param(lambda: aligned(2 * 6 * 24, 0, torch.float16).view(2, 6, 24)[..., :16], 16, id="wider rows"),
        pytest.param(lambda: aligned(2 * 6 * 18, 0, torch.float16).view(2, 6, 18)[..., :16], 4, id="tokens 36 apart"),
        pytest.param(lambda: aligned(2 * 97, 0, torch.float16).view(2, 97)[:, :96].view(2, 6, 16), 2, id="batch 194"),
        pytest.param(lambda: aligned(2 * 6 * 3, 0, torch.int8).view(2, 6, 3), 1, id="rows of 3 bytes"),
        pytest.param(lambda: aligned(2 * 6, 0, torch.int64).view(2, 6), 8, id="positions"),
        pytest.param(
            lambda: aligned(2 * 6 * 16, 0, torch.float16).view(2, 16, 6).transpose(1, 2), 2, id="strided rows"
        ),
        pytest.param(lambda: aligned(2 * 6 * 3, 0, torch.complex128).view(2, 6, 3)[..., ::2], 16, id="strided complex"),
        pytest.param(
            lambda: aligned(6 * 16, 0, torch.float16).view(1, 6, 16).expand(2, 6, 16), 16, id="expanded batch"
        ),
        pytest.param(lambda: aligned(2 * 6, 0, torch.float16).view(2, 6, 1).expand(2, 6, 16), 2, id="expanded rows"),
    ],
)
def test_accesses_are_as_wide_as_addresses_allow(make, width):
    t = make()
    indices = torch.tensor([[5, 0, -1], [2, 3, 99]])
    (table,) = plan([t], indices, [1])
    assert [group["width"] for group in table["groups"]] == [width]
    (want,) = tp.reference.gather_compact([t], indices.where(indices < 6, -1), dims=[1])
    assert torch.equal(gather([t], indices, dims=[1])[0], want)


def test_dimensions_collapse():
    """Contiguous hidden states and caches of one sample need one loop over tokens and one over heads."""
    indices = torch.tensor([[3, 0]])
    tensors = [torch.randn(1, 6, 8, 4), torch.randn(1, 4, 6, 8), torch.randn(1, 3, 4, 6, 8), torch.randn(6, 1, 8)]
    (table,) = plan(tensors, indices, [1, 2, 3, 0], [0, 0, 0, 1])
    assert [group["loops"] for group in table["groups"]] == [1, 2, 2, 1]
    assert [group["row"] * group["width"] for group in table["groups"]] == [128, 32, 32, 32]


@settings(deadline=None, max_examples=300, print_blob=True)
@given(
    n=st.integers(0, 2**31 - 1),
    by=st.integers(1, 2**31 - 1) | st.integers(1, 300) | st.sampled_from([2**30, 2**30 + 1]),
)
def test_division_by_multiplication(n, by):
    for value in (n, n - n % by, max(n - n % by - 1, 0), 2**31 - 1):
        assert module.divide(value, by) == value // by


@st.composite
def strided_tensors(draw, sizes=(1, 2, 3, 16)):
    """Tensors of any strides, their dimensions, and indices."""
    batch, tokens, k = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7])), draw(st.sampled_from([1, 3, 20]))
    tensors, dims, batch_dims = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(2, 5))
        dim, batch_dim = draw(st.permutations(range(rank)))[:2]
        shape = [draw(st.sampled_from(sizes)) for _ in range(rank)]
        shape[dim], shape[batch_dim] = tokens, batch
        order = draw(st.permutations(range(rank)))
        steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in range(rank)]
        dtype = draw(st.sampled_from([torch.int8, torch.int16, torch.float32, torch.int64]))
        base = torch.randint(0, 100, [shape[d] * steps[d] for d in order]).to(dtype)
        strided = base[tuple(slice(None, None, steps[d]) for d in order)]
        tensors.append(strided.permute([order.index(d) for d in range(rank)]))
        dims.append(dim)
        batch_dims.append(batch_dim)
    values = draw(st.lists(st.integers(-1, tokens - 1), min_size=batch * k, max_size=batch * k))
    return tensors, dims, batch_dims, torch.tensor(values).view(batch, k)


@settings(deadline=None, max_examples=100, print_blob=True)
@given(case=strided_tensors(), limit=st.integers(1, 40))
def test_pieces_of_any_size_cover_every_output_once(case, limit):
    """The limit on vectors per piece, 2^31 - 1 in earnest, made small: tensors are cut along their loops and rows."""
    tensors, dims, batch_dims, indices = case
    outputs = outputs_for(tensors, indices.shape[1], dims)
    arguments = (
        inputs_of(tensors, outputs, dims, batch_dims), indices.data_ptr(), indices.stride(), indices.shape[1],
        module.DeviceLimits(), limit,
    )  # fmt: skip
    written = 0
    for table in module.plan_compact(*arguments):
        assert_table_is_sound(table, limit)
        starts = [g["first_tensor"] for g in table["groups"]]
        for group, count in zip(table["groups"], tensors_of_groups(table), strict=True):
            written += group["vectors"] * group["width"] * count
        assert starts == sorted(set(starts))
    assert written == sum(o.numel() * o.element_size() for o in outputs)
    assert module.run_compact(*arguments) == 0
    for got, want in zip(
        outputs, tp.reference.gather_compact(tensors, indices, dims=dims, batch_dims=batch_dims), strict=True
    ):
        assert torch.equal(got, want)


def tensors_of_groups(table) -> list[int]:
    """How many tensors each group has, from the numbers of its blocks."""
    ends = [g["first_block"] for g in table["groups"][1:]] + [table["blocks"]]
    counts = []
    for group, end in zip(table["groups"], ends, strict=True):
        count, rest = divmod(end - group["first_block"], group["blocks"])
        assert rest == 0
        counts.append(count)
    return counts


def assert_table_is_sound(table, limit: int) -> None:
    groups = table["groups"]
    assert 1 <= len(groups) <= module.COMPACT_GROUPS
    assert table["blocks"] <= 2**31 - 1
    assert groups[0]["first_block"] == groups[0]["first_tensor"] == groups[0]["first_loop"] == 0
    assert groups[-1]["first_tensor"] + tensors_of_groups(table)[-1] <= module.COMPACT_TENSORS
    assert groups[-1]["first_loop"] + groups[-1]["loops"] <= module.COMPACT_LOOPS
    for group, count in zip(groups, tensors_of_groups(table), strict=True):
        assert count >= 1
        assert 1 <= group["vectors"] <= limit
        assert (group["blocks"] - 1) * table["vectors_per_block"] < group["vectors"]
        assert group["blocks"] * table["vectors_per_block"] >= group["vectors"]
        loops = table["loops"][group["first_loop"] : group["first_loop"] + group["loops"]]
        assert group["row"] * math.prod(loops) == group["vectors"]
    for before, after in itertools.pairwise(groups):
        assert after["first_loop"] == before["first_loop"] + before["loops"]


@settings(deadline=None, max_examples=200, print_blob=True)
@given(data=st.data())
def test_plans_of_the_largest_sizes(data):
    """Up to exabytes, as addresses only."""
    rank = data.draw(st.integers(2, 6))
    dim, batch_dim = data.draw(st.permutations(range(rank)))[:2]
    element, room = data.draw(st.sampled_from([1, 2, 4, 8, 16])), 2**60
    sizes = []
    for _ in range(rank):
        sizes.append(data.draw(st.integers(1, min(room, data.draw(st.sampled_from([4, 2**12, 2**24, 2**34]))))))
        room //= sizes[-1]
    kept_tokens = sizes[dim]
    strides, stride = [0] * rank, 1
    for d in data.draw(st.permutations(range(rank))):
        strides[d] = stride
        stride *= sizes[d]
    limits = module.DeviceLimits()
    limits.sm_count = data.draw(st.sampled_from([1, 132]))
    limit = module.COMPACT_VECTORS
    total = math.prod(sizes) * element
    if total / limit > 20_000:  # pieces of a byte times 2^31 at the least
        total, sizes[:], kept_tokens = (
            2 * 3 * element,
            [3 if d == dim else 2 if d == batch_dim else 1 for d in range(rank)],
            3,
        )
    one = module.CompactInput(1 << 20, 1 << 40, sizes, strides, element, dim, batch_dim)
    tables = module.plan_compact([one], 1 << 10, [kept_tokens, 1], kept_tokens, limits, limit)
    written = 0
    for table in tables:
        assert_table_is_sound(table, limit)
        for group, count in zip(table["groups"], tensors_of_groups(table), strict=True):
            written += group["vectors"] * group["width"] * count
            first = table["outputs"][group["first_tensor"]]
            assert (1 << 40) <= first < (1 << 40) + total
    assert written == total


# --- the inverse of the indices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "k", "size", "blocks"), [(1, 9, 10, 1), (3, 700, 4096, 3), (2, 900, 9000, 6), (0, 3, 5, 0)]
)
def test_inverse_over_several_ranges(batch, k, size, blocks):
    indices = torch.stack([torch.randperm(size)[:k] for _ in range(batch)]) if batch else torch.zeros(0, k).long()
    got = torch.ops.tokenprune_emulated._invert_indices(indices, size)
    assert torch.equal(got, tp.reference._invert_indices(indices, size))
    assert sum(launch["grid"][0] for launch in module.take_launches()) == blocks


def test_a_small_gpu_goes_through_the_ranges_in_turns():
    module.settings().sm_count = 1
    indices = torch.stack([torch.randperm(20)[:9] for _ in range(21)])
    got = torch.ops.tokenprune_emulated._invert_indices(indices, 20)
    assert torch.equal(got, tp.reference._invert_indices(indices, 20))
    assert [launch["grid"] for launch in module.take_launches()] == [(8, 1, 1)]


def test_checked_indices_raise(tmp_path: Path):
    """TOKENPRUNE_CHECK_INDICES is read once per process."""
    program = (
        "import torch, emulator\n"
        "emulator.load()\n"
        "for bad in (4, -2):\n"
        "    try:\n"
        "        indices, tensors = torch.tensor([[bad]]), [torch.zeros(1, 9), torch.zeros(1, 4)]\n"
        "        torch.ops.tokenprune_emulated.gather_compact(tensors, indices, dims=[1, 1])\n"
        "    except IndexError as error:\n"
        "        print(error)\n"
    )
    told = printed("-c", program, TOKENPRUNE_CHECK_INDICES="1")
    assert [line.split(": ", 1)[1] for line in told.splitlines()] == [
        "indices must lie in [-1, 4), got 4", "indices must lie in [-1, 4), got -2"
    ]  # fmt: skip
