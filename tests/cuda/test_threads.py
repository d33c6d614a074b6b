"""Several threads that launch CUDA kernels, on the emulator: what they share is the context and its limits."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None


def assert_selects(n: int, seed: int) -> None:
    """The best tokens of n, whose keys take 4 n bytes of shared memory."""
    scores = torch.randn(1, n, generator=torch.Generator().manual_seed(seed))
    for got, want in zip(
        tp.select_topk(scores, 100, backend="emulator"), tp.reference.select_topk(scores, 100), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("first", [True, False], ids=["limit not raised yet", "limit raised before"])
def test_a_smaller_launch_of_another_thread_comes_between_a_limit_and_its_launch(first):
    """The limit of shared memory is one for all threads: a smaller launch that lowers it makes the larger one fail."""
    module.settings().shared_per_block = 227 * 1024 - 16  # a device that no other test has
    if first:
        module.settings().shared_per_block -= 16
    else:
        assert_selects(16384, 0)
    module.take_launches()
    with ThreadPoolExecutor(1) as pool:
        module.settings().before_launch = lambda: pool.submit(assert_selects, 9000, 1).result()
        assert_selects(16384, 2)
    assert [launch["shared"] for launch in module.take_launches()] == [4 * 9024, 4 * 16384]


def test_two_threads_select_at_the_same_time():
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(assert_selects, n, seed) for seed in range(4) for n in (16384, 9000)]
        for call in calls:
            call.result()
