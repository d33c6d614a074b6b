"""Triton's repulsion_sample: both ways on the same inputs, launches, groups of samples, configurations."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenprune_kernels as tp
from testing import gpu_backend
from testing.cases import NO_TRITON
from tests.ops.test_repulsion import exact_case, exact_features, over_aggregates, over_potentials, same
from tokenprune_kernels import reference

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


def sample(*args: Any, **options: Any) -> Any:
    return tp.repulsion_sample(*args, **options, backend="triton")


# --- a launch per step -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("seed", range(6))
def test_exact_inputs_in_steps(seed: int) -> None:
    features, k, options = exact_case(seed, (1, 16, 17, 40)[seed % 4], (1, 72, 200)[seed // 2])
    dtype = (torch.float16, torch.float32)[seed % 2]
    same(sample(features.to(dtype), k, **options), reference.repulsion_sample(features.double(), k, **options))


@pytest.mark.usefixtures("steps")
@over_aggregates
@over_potentials
def test_both_ways_agree_on_the_options(potential: str, aggregate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distinct random tokens: no objective is so close to another that rounding would change a pick."""
    from tokenprune_kernels.triton import gram

    options = {
        "positions": torch.rand(2, 50, 3), "energy": torch.rand(2, 50), "mask": torch.rand(2, 50) < 0.9,
        "seed_indices": torch.tensor([[3, -1, 3, 40], [-1, -1, 60, -9]]), "potential": potential,
        "aggregate": aggregate, "exponent": 3.0, "feature_weight": 0.5, "position_weight": 2.0, "sigma": 0.7,
    }  # fmt: skip
    features = torch.randn(2, 50, 24)
    in_steps = sample(features, 8, **options)
    monkeypatch.setattr(gram, "GRAM_TOKENS", 3072)
    same(sample(features, 8, **options), in_steps)
    clean = {**options, "seed_indices": torch.tensor([[3, -1, 3, 40], [-1, -1, -1, -1]])}
    same(in_steps, reference.repulsion_sample(features.double(), 8, **clean))


@pytest.mark.parametrize("tokens", [0, 3072], ids=["steps", "matrix"])
@pytest.mark.parametrize("first", ["outlier", "isolated", "seeds"])
@over_aggregates
def test_identical_tokens_tie(first: str, aggregate: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a token have bitwise the same U wherever they are in a block, so the lower index goes first."""
    from tokenprune_kernels.triton import gram

    monkeypatch.setattr(gram, "GRAM_TOKENS", tokens)
    base, positions = torch.randn(1, 22, 72), torch.rand(1, 22, 2)
    if (tokens or first == "isolated") and not gpu_backend.has_gpu():
        # The interpreter multiplies matrices with BLAS, whose order of summation depends on row and column;
        # matrix instructions do not. Inner products of integers have no rounding, norms and cosines still do.
        base = torch.randint(-8, 9, base.shape).float()
    start = {"seed_indices": torch.tensor([[4]])} if first == "seeds" else {"first": first}
    picks, counts = sample(
        base.repeat(1, 3, 1), 30, positions=positions.repeat(1, 3, 1), potential="riesz", aggregate=aggregate,
        exponent=3.0, **start,
    )  # fmt: skip
    assert counts.tolist() == [30]
    step = torch.full((66,), 30).scatter(0, picks[0], torch.arange(30))  # 30: not picked
    one, two, three = step.view(3, 22)
    if first == "seeds":
        one[4] = -1
    assert ((one < two) | (one == 30)).all()
    assert ((two < three) | (two == 30)).all()
    assert (two < 30).any()


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("first", ["outlier", "isolated"])
def test_starts_in_steps(first: str) -> None:
    """Several blocks of tokens, channels and splits; a NaN among the features; the outlier is one by a wide margin."""
    features = exact_features(torch.Generator().manual_seed(5), 2, 150, 150).abs()
    features[:, 77] *= -1
    features[1, 100, 3] = torch.nan
    mask = torch.rand(2, 150) < 0.9
    mask[:, 77] = True
    mask[1, 100] = False
    want = reference.repulsion_sample(features.double(), 1, mask=mask, first=first)
    same(sample(features, 1, mask=mask, first=first), want)


# --- launches --------------------------------------------------------------------------------------------------------


def test_launches_with_a_matrix(launches: list[str]) -> None:
    features = torch.randn(2, 50, 8)
    for options, start in (
        ({}, 1),
        ({"first": "isolated"}, 1),
        ({"first": "index"}, 0),
        ({"energy": features.sum(-1)}, 0),
    ):
        launches.clear()
        sample(features, 20, **options)
        assert launches == ["gram_kernel", *["start_kernel"] * start, "greedy_kernel"]
    launches.clear()
    sample(features[:0], 20)
    assert launches == []


@pytest.mark.usefixtures("steps")
def test_launches_in_steps(launches: list[str]) -> None:
    features = torch.randn(2, 50, 8)
    sample(features, 4)
    before = ["inverse_norms_kernel", "direction_kernel", "outlier_kernel", "begin_kernel"]
    assert launches == [*before, *["step_kernel"] * 4]
    launches.clear()
    sample(features, 60, first="isolated")
    assert launches == ["inverse_norms_kernel", "isolated_kernel", "begin_kernel", *["step_kernel"] * 50]


def test_groups_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than there is memory for matrices: group after group, with the same results."""
    from tokenprune_kernels.triton import gram

    features, mask = torch.randn(5, 20, 8), torch.rand(5, 20) < 0.8
    calls = lambda: (  # noqa: E731
        *sample(features, 6, mask=mask, seed_indices=torch.arange(5).unsqueeze(1)), *sample(features, 6, mask=mask),
    )  # fmt: skip
    together = calls()
    monkeypatch.setattr(gram, "GRAM_BYTES", 2 * 20 * 32 * 4)
    assert gram.samples_at_once(20) == 2
    for got, want in zip(calls(), together, strict=True):
        assert torch.equal(got, want)


# --- configurations --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(n=st.integers(0, 70000), channels=st.integers(0, 9000))
def test_configurations(n: int, channels: int) -> None:
    from tokenprune_kernels.triton import repulsion, repulsion_steps

    if n <= 3072:
        config = repulsion.greedy_config(n)
        assert n <= config.blocks["BLOCK_N"] <= 512 * config.num_warps  # at most 16 tokens per thread
    blocks = [*repulsion.start_config(n).blocks.values(), *repulsion_steps.direction_config(channels).blocks.values()]
    assert all(b & (b - 1) == 0 for b in blocks)


def test_numbers_beyond_float32() -> None:
    from tokenprune_kernels.triton import repulsion_objective as objective
    from tokenprune_kernels.triton.runtime import float32

    assert objective.weights(1.0, 0.5, 3.0, 1e-6, 1e200) == (2.0, 0.5, 1.5, float32(1e-6), float("inf"))
    assert float32(0.1) == torch.tensor(0.1).item()
    assert [objective.power_of(e) for e in (1.0, 2.0, 1.5)] == [1, 2, 0]
