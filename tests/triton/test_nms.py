"""Triton's spatial_semantic_nms: both ways against the reference, launches, groups of samples, configurations."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenprune_kernels as tp
from testing.cases import NO_TRITON
from tests.ops.test_nms import clustered, error_of, grid, one_hot
from tokenprune_kernels import reference

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


def nms(*args: Any, **options: Any) -> Any:
    return tp.spatial_semantic_nms(*args, **options, backend="triton")


# --- a launch per step -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_exact_inputs_in_steps(mode: str) -> None:
    scores = torch.randint(-6, 60, (2, 42)).float() / 8
    scores[0, 5], scores[1, 7] = torch.nan, torch.inf
    features, positions = one_hot(2, 42, 8, 3), grid(6, 7, 2)
    options = {
        "groups": torch.randint(0, 2, (2, 42)), "mask": torch.rand(2, 42) < 0.9, "mode": mode, "radius": 2.0,
        "sigma_spatial": torch.inf,
    }  # fmt: skip
    got, exact = nms(scores, features, positions, 45, **options), reference.spatial_semantic_nms(
        scores.double(), features, positions, 45, **options
    )  # fmt: skip
    assert torch.equal(got[0], exact[0])
    torch.testing.assert_close(got[1].double(), exact[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[2], exact[2])


@pytest.mark.usefixtures("steps")
def test_in_steps_as_good_as_torch() -> None:
    inputs = torch.rand(1, 81), clustered(1, 81, 133), grid(9, 9)
    _, plain = error_of(reference.spatial_semantic_nms(*inputs, 20), *inputs)
    shortfall, error = error_of(nms(*inputs, 20), *inputs)
    allowed = 2 * plain + 16 * torch.finfo(torch.float32).eps
    assert error <= allowed
    assert shortfall <= 2 * allowed


# --- launches --------------------------------------------------------------------------------------------------------


def test_launches_with_a_matrix(launches: list[str]) -> None:
    features = torch.randn(2, 50, 8)
    nms(features.sum(-1), features, grid(5, 10, 2), 20)
    assert launches == ["gram_kernel", "nms_kernel"]


@pytest.mark.usefixtures("steps")
def test_launches_in_steps(launches: list[str]) -> None:
    features = torch.randn(2, 50, 8)
    nms(features.sum(-1), features, grid(5, 10, 2), 3)
    assert launches == ["inverse_norms_kernel", "nms_begin_kernel", *["nms_step_kernel"] * 3]


def test_groups_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than there is memory for matrices: group after group, with the same results."""
    from tokenprune_kernels.triton import gram

    inputs = torch.rand(5, 20), torch.randn(5, 20, 8), grid(4, 5, 5)
    mask = torch.rand(5, 20) < 0.8
    together = nms(*inputs, 6, mask=mask)
    monkeypatch.setattr(gram, "GRAM_BYTES", 2 * 20 * 32 * 4)
    assert gram.samples_at_once(20) == 2
    for got, want in zip(nms(*inputs, 6, mask=mask), together, strict=True):
        assert torch.equal(got, want)


@settings(deadline=None, max_examples=100)
@given(n=st.integers(0, 3072))
def test_configurations(n: int) -> None:
    from tokenprune_kernels.triton.nms import nms_config

    config = nms_config(n)
    assert n <= config.blocks["BLOCK_N"] <= 512 * config.num_warps  # at most 16 tokens per thread
