"""The CUDA emulator itself: it finds what it promises to find, and its twins compute what the hardware computes."""

import math
import os
import shutil
import subprocess
from types import ModuleType

import pytest
import torch
from torch import Tensor

import emulator
from emulator import build
from testing.cases import NO_EMULATOR
from tests.cuda.broken import in_all_schedules, run, schedules

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="no C++ compiler")


# --- missing barriers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [0, 1, 2], ids=["correct", "none before the reads", "none before the writes"])
def test_a_missing_barrier_shows(broken, variant):
    """Missing barriers show as poison (NaN) or as results that depend on the schedule; present ones do not."""
    values = torch.arange(1, 97, dtype=torch.float32)
    results = in_all_schedules(
        broken, "reduce_twice", values, out=torch.empty(96, 2), variant=variant, block=(96, 1, 1)
    )
    want = torch.tensor([96 * 97 / 2, 96.0]).expand(96, 2)
    right = [torch.equal(got, want) for got in results]
    if variant == 0:
        assert all(right)
        return
    assert not all(right)
    poisoned = any(bool(got.isnan().any()) for got in results)
    differ = any(not torch.equal(got, results[0]) for got in results[1:])
    assert poisoned if variant == 1 else differ


def test_the_reductions_of_the_kernels_have_their_barriers(broken):
    values = torch.arange(1, 161, dtype=torch.float32)
    results = in_all_schedules(broken, "library_reductions", values, out=torch.empty(160, 4), block=(160, 1, 1))
    want = torch.stack(
        [
            torch.full((160,), 12880.0),
            torch.full((160,), 160.0),
            values.cumsum(0) - values,
            torch.full((160,), 12880.0),
        ],
        1,
    )
    for got in results:
        assert torch.equal(got, want)


# --- accesses out of bounds -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> str:
    return str(build.build_broken_program())


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("memory", ["dynamic", "static", "global"])
@pytest.mark.parametrize("access", ["read", "write"])
def test_one_element_too_far_is_found(program, access, memory):
    name = f"{access}_{memory}"
    good, bad = run_program(program, name, "0"), run_program(program, name, "1")
    assert (good.returncode, good.stdout, good.stderr) == (0, "cudaSuccess\n", "")
    assert bad.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in bad.stderr
    kind, site = bad.stderr.splitlines()[2:4]
    assert kind.startswith(f"{access.upper()} of size 4 at ")
    assert f" in broken::{name}(Arguments) " in site
    assert "0 bytes to the right of 128-byte region" in bad.stderr or "0 bytes after 128-byte region" in bad.stderr


def test_a_misaligned_vector_is_found(program):
    good, bad = run_program(program, "read_vector", "0"), run_program(program, "read_vector", "1")
    assert (good.returncode, good.stdout, good.stderr) == (0, "cudaSuccess\n", "")
    assert bad.returncode != 0
    assert "misaligned address" in bad.stderr
    assert "which requires 16 byte alignment" in bad.stderr


def test_stacks_that_an_error_leaves_behind_are_clean_again(program):
    done = run_program(program, *["one_thread_throws", "7", "one_thread_throws", "-1"] * 3, "read_static", "0")
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout.splitlines()
    assert told[1::2] == ["cudaSuccess"] * 3
    assert all("thrown on purpose" in line for line in told[0:6:2])


# --- what would hang or be undefined ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("half_at_a_barrier", {"variant": 16}, "cannot go on: .* 16 wait at a block barrier, .* 16 have ended"),
        ("half_at_a_barrier", {"variant": 33, "block": (64, 1, 1)}, "33 wait at a block barrier, .* 31 have ended"),
        ("half_at_a_cluster_barrier", {"blocks": 2, "cluster": 2},
         r"block \(0, 0, 0\) and its cluster .* 32 wait at a cluster barrier, .* 32 have ended"),
        ("ends_in_a_collective", {}, "31 wait in a warp collective, 1 have ended"),
        ("lanes_in_different_collectives", {}, r"block \(0, 0, 0\), thread .*: __\w+ while other lanes wait in __\w+"),
        ("lanes_with_different_masks", {}, "__syncwarp with another mask than the lanes that wait for it"),
        ("mask_without_its_lane", {}, "__syncwarp with a mask that leaves out its own lane"),
        ("shuffle_from_outside", {}, "shuffle reads from a lane outside its mask"),
        ("copy_misaligned", {"shared": 64}, "asynchronous copy at an address that is not 16-byte aligned"),
        ("copy_misaligned", {"shared": 64, "variant": 1}, "copy at an address that is not 16-byte aligned"),
        ("copy_from_null", {"shared": 64}, "asynchronous copy from a null pointer"),
        ("copy_from_null", {"shared": 64, "variant": 16368}, "asynchronous copy from a null pointer"),
        ("cluster_neighbours", {"shared": 227 * 1024}, "more static and dynamic shared memory than a block has"),
        ("copy_without_wait", {"shared": 64}, "ends with asynchronous copies that were not waited for"),
        ("load_matrices", {"shared": 2048, "variant": 1}, "ldmatrix: misaligned row"),
        ("cluster_misuse", {"blocks": 2, "cluster": 2}, "a block that its cluster does not have"),
        ("cluster_misuse", {"blocks": 2, "cluster": 2, "variant": 1}, "a block that has ended|may still use its"),
        ("cluster_misuse", {"blocks": 2, "cluster": 2, "variant": 2}, "address that is not in its shared memory"),
        ("cluster_misuse", {"blocks": 2, "cluster": 2, "variant": 3}, "the other block has not reached yet"),
        ("cluster_misuse", {"blocks": 2, "cluster": 2, "variant": 4}, "a block that may not have started"),
        ("cluster_misuse", {"blocks": 2, "cluster": 2, "variant": 5}, "a block that has ended|may still use its"),
    ],
)  # fmt: skip
def test_mistakes_are_errors_in_every_schedule(broken, name, arguments, message):
    """Naming the kernel, and the next launch works."""
    given, out = torch.zeros(512, dtype=torch.int32), torch.empty(512, dtype=torch.int32)
    given = given[-given.data_ptr() % 16 // 4 :]
    for _ in schedules(broken):
        with pytest.raises(RuntimeError, match=rf"(?s).*{message}") as caught:
            run(broken, name, given, out, **arguments)
        if "outside its mask" not in message and "ldmatrix" not in message:
            assert f"kernel broken::{name}" in str(caught.value)
        run(broken, "one_thread_throws", None, out, variant=-1)


def test_the_memory_of_an_ended_block_is_out_of_reach(broken):
    """In the schedules where the other block ends first, its memory can neither be mapped nor still be read."""
    pair = {"blocks": 2, "cluster": 2}
    found = []
    for _ in schedules(broken):
        with pytest.raises(RuntimeError) as caught:
            run(broken, "cluster_misuse", variant=1, **pair)
        found.append("asks for the shared memory of a block that has ended" in str(caught.value))
    assert any(found)
    results = in_all_schedules(broken, "cluster_access_too_late", out=torch.zeros(32, dtype=torch.int32), **pair)
    assert any(bool((got == -1).all()) for got in results)
    broken.settings().schedule = broken.Schedule.reversed
    with pytest.raises(RuntimeError, match=r"too_late, block \(1, 0, 0\): its shared memory was written to"):
        run(broken, "cluster_access_too_late", variant=1, **pair)


def test_device_code_outside_a_kernel_is_an_error(broken):
    with pytest.raises(RuntimeError, match="device code runs outside a kernel"):
        broken.outside_a_kernel()


def test_errors_leave_usable_stacks(broken):
    """The stacks of all the other threads are abandoned in mid-flight, and used again by the next launch."""
    for i in range(40):
        with pytest.raises(RuntimeError, match="thrown on purpose"):
            run(broken, "one_thread_throws", variant=i, block=(64, 1, 1))
        out = run(broken, "one_thread_throws", None, torch.full((96,), -1, dtype=torch.int32), -1, block=(96, 1, 1))
        assert torch.equal(out, torch.arange(96, dtype=torch.int32))


# --- refused launches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block", "shared", "cluster", "status"),
    [
        ((1, 1, 1), (1024, 1, 1), 48 * 1024, 1, "cudaSuccess"),
        ((8, 1, 1), (32, 1, 1), 0, 8, "cudaSuccess"),
        ((0, 1, 1), (32, 1, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((1, 0, 1), (32, 1, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((1, 1, 0), (32, 1, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (0, 1, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((1, 65536, 1), (32, 1, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((1, 1, 65536), (32, 1, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((2**31, 1, 1), (32, 1, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (1025, 1, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (32, 33, 1), 0, 1, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (1, 1, 65), 0, 1, "cudaErrorInvalidConfiguration"),
        ((3, 1, 1), (32, 1, 1), 0, 2, "cudaErrorInvalidConfiguration"),
        ((16, 1, 1), (32, 1, 1), 0, 16, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (32, 1, 1), 48 * 1024 + 1, 1, "cudaErrorInvalidValue"),
    ],
)  # fmt: skip
def test_launches_are_refused_as_a_gpu_refuses_them(broken, grid, block, shared, cluster, status):
    assert broken.launch_raw(grid, block, shared, cluster, False) == status


def test_clusters_need_an_architecture_that_has_them_and_room(broken):
    assert broken.launch_raw((2, 1, 1), (32, 1, 1), 0, 2, False) == "cudaSuccess"
    broken.settings().largest_cluster = 4
    assert broken.launch_raw((8, 1, 1), (32, 1, 1), 0, 4, False) == "cudaSuccess"
    assert broken.launch_raw((8, 1, 1), (32, 1, 1), 0, 8, False) == "cudaErrorInvalidConfiguration"
    broken.settings().architecture = 80
    assert broken.launch_raw((2, 1, 1), (32, 1, 1), 0, 2, False) == "cudaErrorInvalidConfiguration"
    assert broken.launch_raw((2, 1, 1), (32, 1, 1), 0, 1, False) == "cudaSuccess"


def test_launches_ask_for_the_shared_memory_they_need(broken):
    """launch() opts in above 48 KB, up to what the device has; an empty grid is no launch."""
    out, given = torch.empty(512, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)

    def status(shared: int, blocks: int = 1) -> str:
        return broken.run("load_matrices", blocks, (32, 1, 1), shared, 1, False, given.data_ptr(), out.data_ptr(), 0)

    assert status(227 * 1024) == "cudaSuccess"
    assert status(227 * 1024 + 1) == "cudaErrorInvalidValue"
    broken.settings().shared_per_block = 99 * 1024
    assert status(99 * 1024 + 1) == "cudaErrorInvalidValue"
    assert status(99 * 1024) == "cudaSuccess"
    assert status(0, blocks=0) == "cudaSuccess"


@pytest.mark.parametrize("blocks", [2**31, 2**32, 2**32 + 1, -1])
def test_launches_of_more_blocks_than_a_grid_has_are_refused(broken, blocks):
    """By launch(), where no bit of the planners' numbers is lost: in 32 bits 2^32 + 1 is a launch of one block."""
    status = broken.run("read_dynamic", blocks, (32, 1, 1), 0, 1, False, 0, 0, 0)
    assert status == "cudaErrorInvalidConfiguration"


REAL_OPS = {
    "score_entropy": lambda: ((torch.rand(2, 9),), {}),
    "_invert_indices": lambda: ((torch.tensor([[0, 2], [1, -1]]), 4), {}),
    "gather_compact": lambda: (([torch.rand(2, 4, 3)], torch.tensor([[0, 2], [1, -1]])), {"dims": [1]}),
}


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
@pytest.mark.parametrize("op", REAL_OPS)
def test_a_refused_launch_of_an_op_is_reported_and_the_next_call_works(op):
    module = emulator.load()
    args, kwargs = REAL_OPS[op]()
    call = getattr(torch.ops.tokenprune_emulated, op)
    shape = list(next(a for a in args if isinstance(a, Tensor)).shape)
    want = call(*args, **kwargs)
    module.settings().fail_launch = 1
    try:
        with pytest.raises(RuntimeError) as caught:
            call(*args, **kwargs)
    finally:
        module.settings().reset()
    assert caught.type is RuntimeError
    for part in (f"tokenprune::{op}: ", "CUDA error cudaErrorInvalidValue (invalid argument)", f" {shape} "):
        assert part in str(caught.value)
    again = call(*args, **kwargs)
    pairs = [(again, want)] if isinstance(want, Tensor) else zip(again, want, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
def test_a_call_of_too_many_blocks_names_its_arguments_and_the_limit():
    settings = emulator.load().settings()
    settings.fail_launch, settings.fail_status = 1, 9  # what launch() says to them
    try:
        with pytest.raises(
            RuntimeError, match=r"Configuration .*; a launch has at most 2147483647 blocks for scores \["
        ):
            torch.ops.tokenprune_emulated.score_entropy(torch.rand(2, 9))
    finally:
        settings.reset()


# --- twins ------------------------------------------------------------------------------------------------------------


def test_ldmatrix_hands_out_four_matrices(broken):
    """Register m of lane l: elements 2 (l % 4) and the next of row l / 4 of matrix m, whose rows lanes 8 m.. name."""
    rows = torch.randint(-(2**15), 2**15, (32, 8), dtype=torch.int16)
    for got in in_all_schedules(
        broken, "load_matrices", rows, out=torch.empty(32, 4, dtype=torch.int32), shared=48 * 32
    ):
        elements = got.view(torch.int16).view(32, 4, 2)
        for lane in range(32):
            for matrix in range(4):
                row = rows[8 * matrix + lane // 4]
                assert elements[lane, matrix].tolist() == row[2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()


def test_copies_arrive_when_they_are_waited_for(broken):
    """Until then their destination has neither what was there nor what comes: hardware may be as early, or as late."""
    source = torch.arange(32 * 8 + 3, dtype=torch.int32)
    source = source[-source.data_ptr() % 16 // 4 :][: 32 * 8].view(32, 8)
    out = run(broken, "copies", source, torch.zeros(32, 3, 3, dtype=torch.int32), shared=32 * 48)
    first, second = source[:, 3], source[:, 7]
    poison, zero = torch.full_like(first, -1), torch.zeros_like(first)
    want = [[poison, poison, poison], [first, poison, poison], [first, second, zero]]
    assert torch.equal(out, torch.stack([torch.stack(row, 1) for row in want], 1))


@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(broken, width):
    values = torch.randperm(32, dtype=torch.int32)
    want = []
    for lane in range(32):
        group = lane // width * width
        sources = [group + (lane * 7 + 3) % width, lane ^ 5,
                   lane - 3 if lane - 3 >= group else lane, lane + 3 if lane + 3 < group + width else lane,
                   2 if lane < 16 else 30]  # fmt: skip
        want.append([values[s] for s in sources])
    for got in in_all_schedules(broken, "shuffles", values, out=torch.empty(32, 5, dtype=torch.int32), variant=width):
        assert torch.equal(got, torch.tensor(want, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["random", "zeros", "ones"])
def test_votes_reductions_and_scans(broken, kind):
    make = {"random": lambda: torch.randint(0, 1000, (32,)), "zeros": lambda: torch.zeros(32).long(),
            "ones": lambda: torch.full((32,), 7)}  # fmt: skip
    values = make[kind]().int()
    v = values.tolist()
    shared = [sum((x & 1) << i for i, x in enumerate(v)), int(any(x & 2 for x in v)), int(all(x & 4 for x in v)),
              sum(v), min(v), max(v), math.prod([1])]  # fmt: skip
    ored = 0
    for x in v:
        ored |= x
    shared[6] = ored
    for got in in_all_schedules(broken, "votes", values, out=torch.empty(32, 13, dtype=torch.int32)):
        for lane, row in enumerate(got.tolist()):
            first = lane // 8 * 8
            block = [sum(x & 1 for x in v), shared[1], shared[2], 0]
            row[0] &= 0xFFFFFFFF
            assert row == [*shared, sum(v[first : first + 8]), sum(v[: lane + 1]), *block]


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_clusters_share_their_memory(broken, cluster):
    out = torch.empty(8, 32, 2, dtype=torch.int32)
    lanes = torch.arange(32)
    for got in in_all_schedules(broken, "cluster_neighbours", out=out, blocks=8, shared=128, cluster=cluster):
        for block in range(8):
            rank = (block % cluster + 1) % cluster
            assert torch.equal(got[block, :, 0], (1000 * (block // cluster * cluster + rank) + lanes).int())
            assert torch.equal(got[block, :, 1], (1000 * rank + 100 * cluster + lanes).int())


def convert(broken: ModuleType, name: str, given: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(given.shape, dtype=dtype)
    getattr(broken, name)(given.data_ptr(), out.data_ptr(), given.numel())
    return out


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.half), ("bfloat16", torch.bfloat16)])
def test_conversions_are_those_of_torch(broken, name, dtype):
    """All 65536 patterns there and back; every midpoint between two of them, its neighbours, and random floats."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.int16)
    floats = convert(broken, f"{name}_to_float", patterns.view(dtype), torch.float32)
    number = ~patterns.view(dtype).isnan()
    assert torch.equal(floats.view(torch.int32)[number], patterns.view(dtype).float().view(torch.int32)[number])
    assert bool(floats[~number].isnan().all())
    back = convert(broken, f"float_to_{name}", floats, dtype)
    assert torch.equal(back.view(torch.int16)[number], patterns[number])
    ordered = floats[number & floats.isfinite()].double().unique()
    middle = ((ordered[1:] + ordered[:-1]) / 2).float()
    tried = torch.cat([
        middle, middle.nextafter(torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf)),
        torch.randint(-(2**31), 2**31, (200_000,)).int().view(torch.float32),
        torch.tensor([math.inf, -math.inf, 65504.0, 65519.9, 65520.0, 3.4e38, -0.0, 1e-45]),
    ])  # fmt: skip
    got, want = convert(broken, f"float_to_{name}", tried, dtype), tried.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    same = ~want.isnan()
    assert torch.equal(got.view(torch.int16)[same], want.view(torch.int16)[same])
