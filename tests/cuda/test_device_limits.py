"""What a device cannot do, or a kernel cannot count: another plan, or an error that says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None

IN_CLUSTERS: dict[str, Callable[..., Any]] = {
    "select_topk": lambda **on: tp.select_topk(torch.arange(16400.0).flip(0)[None], 5, **on),
    "cosine_scores": lambda **on: tp.cosine_scores(torch.eye(3, 600)[None], torch.eye(9, 600)[None], **on),
    "dpp_sample": lambda **on: tp.dpp_sample(torch.eye(12, 8)[None], 3, **on),
}


@pytest.mark.parametrize("op", IN_CLUSTERS)
def test_a_device_without_room_for_eight_blocks_gets_no_clusters(op: str) -> None:
    """The smallest instances of a GPU that is cut into several; what nobody has room for is refused."""
    clusters = {}
    for largest in (8, 4):
        module.settings().largest_cluster = largest
        module.take_launches()
        got, want = IN_CLUSTERS[op](backend="emulator"), IN_CLUSTERS[op](backend="reference")
        torch.testing.assert_close(got, want)
        clusters[largest] = {launch["cluster"] for launch in module.take_launches()}
    assert max(clusters[8]) > 1
    assert clusters[4] == {1}


BEYOND = 2**30 + 1


def ones(*shape: int) -> Tensor:
    """Of any size, in one element."""
    return torch.ones(()).expand(shape)


TOO_MANY: dict[str, Callable[..., Any]] = {
    "coverage_sample, tokens": lambda **on: tp.coverage_sample(ones(1, 1, BEYOND), 1, **on),
    "coverage_sample, rows": lambda **on: tp.coverage_sample(ones(1, BEYOND, 1), 1, **on),
    "spatial_semantic_nms": lambda **on: tp.spatial_semantic_nms(
        ones(1, BEYOND), ones(1, BEYOND, 1), ones(1, BEYOND, 2), 1, **on
    ),
}


@pytest.mark.parametrize("call", TOO_MANY)
def test_more_tokens_than_a_greedy_op_counts_are_an_error(call: str) -> None:
    with pytest.raises(RuntimeError, match=r"must have at most 2\^30 tokens on a GPU, got 1073741825$"):
        TOO_MANY[call](backend="emulator")
