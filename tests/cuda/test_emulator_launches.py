"""Cooperative and dependent launches on the emulator: who waits for whom, and launches that are refused."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.cuda.broken import in_all_schedules, run, schedules

# --- cooperative launches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [0, 2**32 - 3])
def test_blocks_of_a_cooperative_launch_wait_for_each_other(broken, begin):
    """Their counter is memory, and may run over; without the barrier a block sees what only some have written."""
    blocks, given = 5, torch.tensor([begin - 2**32 if begin else 0], dtype=torch.int32)
    out = torch.cat([given, torch.zeros(blocks + blocks * 64, dtype=torch.int32)])
    where = {"blocks": blocks, "block": (64, 1, 1), "cooperative": True}
    for got in in_all_schedules(broken, "sum_over_grid", given, out=out, **where):
        assert got[0] == given + blocks
        assert (got[1 + blocks :] == 2**blocks - 1).all()
    unordered = in_all_schedules(broken, "sum_over_grid", given, out=out, variant=1, **where)
    assert any((got[1 + blocks :] != 2**blocks - 1).any() for got in unordered)


def test_blocks_that_wait_for_each_other_in_vain_are_an_error(broken):
    """Because one of them ends, or because the launch is not cooperative and they run one after the other."""
    given, out = torch.zeros(1, dtype=torch.int32), torch.zeros(200, dtype=torch.int32)
    pair = {"blocks": 2}
    with pytest.raises(RuntimeError, match=r"and all others 31 wait at a block .* 1 wait for other blocks"):
        run(broken, "sum_over_grid", given, out, variant=2, cooperative=True, **pair)
    with pytest.raises(RuntimeError, match="1 wait for other blocks"):
        run(broken, "sum_over_grid", given, out.zero_(), **pair)
    run(broken, "sum_over_grid", given, out.zero_(), cooperative=True, **pair)
    assert (out[3:67] == 3).all()


def test_cooperative_launches_must_fit_on_the_device(broken):
    """All their blocks are there at the same time, as many of a multiprocessor as its memory and threads allow."""
    settings = broken.settings()
    settings.sm_count = 2

    def status(blocks: int, threads: int, shared: int = 0, cluster: int = 1) -> str:
        return broken.launch_raw((blocks, 1, 1), (threads, 1, 1), shared, cluster, True)

    assert status(64, 32) == "cudaSuccess"
    assert status(65, 32) == "cudaErrorCooperativeLaunchTooLarge"
    assert status(4, 1024) == "cudaSuccess"
    assert status(5, 1024) == "cudaErrorCooperativeLaunchTooLarge"
    assert status(8, 32, 48 * 1024) == "cudaSuccess"
    assert status(9, 32, 48 * 1024) == "cudaErrorCooperativeLaunchTooLarge"
    assert status(2, 32, cluster=2) == "cudaErrorNotSupported"
    settings.cooperative = False
    assert status(1, 32) == "cudaErrorNotSupported"


def test_a_launch_of_many_threads_leaves_memory_to_map(broken):
    """The kernel bounds how many pieces of memory a process maps, and each stack of a thread takes two."""

    def mapped() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    blocks, threads, before = 12, 1024, mapped()
    given, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1 + blocks + blocks * threads, dtype=torch.int32)
    run(broken, "sum_over_grid", given, out, blocks=blocks, block=(threads, 1, 1), cooperative=True)
    assert (out[1 + blocks :] == 2**blocks - 1).all()
    assert mapped() < before + blocks * threads


# --- dependent launches -----------------------------------------------------------------------------------------------


def lead_and_follow(broken: ModuleType, variant: int, followers: int = 1) -> list[Tensor]:
    given, out = torch.arange(32.0), torch.cat([torch.zeros(64), torch.ones(32)])
    assert broken.run_dependent(followers, given.data_ptr(), out.data_ptr(), variant) == "cudaSuccess"
    return list(out.view(3, 32))


@pytest.mark.parametrize("followers", [0, 1, 2, 3])
def test_dependent_launches_wait_for_each_other(broken, followers):
    for _ in schedules(broken):
        sums, doubles, addends = lead_and_follow(broken, 0, followers)
        assert torch.equal(sums, torch.arange(32.0) + 1)
        assert torch.equal(doubles, 2 * followers * sums)
        assert addends.tolist() == [7.0 if followers else 1.0] * 32


@pytest.mark.parametrize("variant", [1, 4], ids=["no thread waits", "a thread does not wait"])
def test_a_dependent_launch_that_does_not_wait_is_an_error(broken, variant):
    for _ in schedules(broken):
        with pytest.raises(RuntimeError, match=r"follow.*ends without having waited for the launch before"):
            lead_and_follow(broken, variant)
        assert torch.equal(lead_and_follow(broken, 0)[0], torch.arange(32.0) + 1)  # nothing is left behind


def test_what_a_dependent_launch_does_before_it_waits_comes_first(broken):
    for _ in schedules(broken):
        sums, doubles, _ = lead_and_follow(broken, 2)
        assert torch.equal(sums, torch.arange(32.0) + 1)
        assert doubles.tolist() == [0.0] * 32  # twice what was there before
        sums, _, _ = lead_and_follow(broken, 3)
        assert torch.equal(sums, torch.arange(32.0) + 7)  # with what it has overwritten


def test_dependent_launches_need_compute_capability_9(broken):
    broken.settings().architecture = 89
    out = torch.zeros(96)
    assert broken.run_dependent(1, out.data_ptr(), out.data_ptr(), 0) == "cudaErrorInvalidConfiguration"
