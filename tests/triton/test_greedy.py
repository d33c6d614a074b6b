"""Triton's greedy ops: both ways on the same inputs, launches, groups of samples, block loops, configurations."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenprune_kernels as tp
from testing import gpu_backend
from testing.cases import NO_TRITON
from tests.ops.test_nms import clustered, error_of, grid, one_hot
from tests.ops.test_repulsion import exact_case, exact_features, over_aggregates, over_potentials, same
from tokenprune_kernels import reference

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs go the way of large ones."""
    from tokenprune_kernels.triton import gram

    monkeypatch.setattr(gram, "GRAM_TOKENS", 0)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would be launched, instead of launches."""
    from tokenprune_kernels.triton import runtime

    names: list[str] = []
    monkeypatch.setattr(runtime, "recorder", lambda kernel, grid, args, keywords: names.append(kernel.fn.__name__))
    return names


def sample(*args: Any, **options: Any) -> Any:
    return tp.repulsion_sample(*args, **options, backend="triton")


def nms(*args: Any, **options: Any) -> Any:
    return tp.spatial_semantic_nms(*args, **options, backend="triton")


# --- repulsion_sample, a launch per step -----------------------------------------------------------------------------


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


# --- spatial_semantic_nms, a launch per step -------------------------------------------------------------------------


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_exact_nms_in_steps(mode: str) -> None:
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
def test_nms_in_steps_as_good_as_torch() -> None:
    inputs = torch.rand(1, 81), clustered(1, 81, 133), grid(9, 9)
    _, plain = error_of(reference.spatial_semantic_nms(*inputs, 20), *inputs)
    shortfall, error = error_of(nms(*inputs, 20), *inputs)
    allowed = 2 * plain + 16 * torch.finfo(torch.float32).eps
    assert error <= allowed
    assert shortfall <= 2 * allowed


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
    nms(features.sum(-1), features, grid(5, 10, 2), 20)
    assert launches == ["gram_kernel", "nms_kernel"]
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
    launches.clear()
    nms(features.sum(-1), features, grid(5, 10, 2), 3)
    assert launches == ["inverse_norms_kernel", "nms_begin_kernel", *["nms_step_kernel"] * 3]


def test_groups_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than there is memory for matrices: group after group, with the same results."""
    from tokenprune_kernels.triton import gram

    features, mask, scores = torch.randn(5, 20, 8), torch.rand(5, 20) < 0.8, torch.rand(5, 20)
    calls = lambda: (  # noqa: E731
        *sample(features, 6, mask=mask, seed_indices=torch.arange(5).unsqueeze(1)), *sample(features, 6, mask=mask),
        *nms(scores, features, grid(4, 5, 5), 6, mask=mask),
    )  # fmt: skip
    together = calls()
    monkeypatch.setattr(gram, "GRAM_BYTES", 2 * 20 * 32 * 4)
    assert gram.samples_at_once(20) == 2
    for got, want in zip(calls(), together, strict=True):
        assert torch.equal(got, want)


def test_tiles_of_the_triangle() -> None:
    """Even and odd numbers of tiles, the last one partly filled: inner products of all pairs, symmetric to the bit."""
    from tokenprune_kernels.triton import gram

    for n in (1, 64, 65, 130, 200):
        features = torch.randint(-3, 4, (2, n, 70)).float()
        dots, inverse = gram.gram(features)
        assert torch.equal(dots[:, :, :n], features @ features.mT)
        torch.testing.assert_close(inverse, 1 / features.norm(dim=-1), rtol=3e-7, atol=0)


# --- configurations --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(batch=st.integers(0, 5000), n=st.integers(0, 70000), channels=st.integers(0, 9000))
def test_configurations(batch: int, n: int, channels: int) -> None:
    from tokenprune_kernels.triton import gram, nms, repulsion, repulsion_steps
    from tokenprune_kernels.triton.runtime import Target

    assert gram.stores_gram(n) == (n <= 3072)
    if n <= 3072:
        group = gram.samples_at_once(n)
        assert group >= 1
        assert group * n * gram.gram_pitch(n) * 4 <= 256 << 20
        assert 0 <= gram.gram_pitch(n) - n < 16
        for config in (repulsion.greedy_config(n), nms.nms_config(n)):
            assert config.blocks["BLOCK_N"] >= n
            assert config.blocks["BLOCK_N"] <= 512 * config.num_warps  # at most 16 tokens per thread
    limits = {
        Target("cuda", 80): 163,
        Target("cuda", 90): 227,
        Target("cuda", 100): 227,
        Target("hip", "gfx942", 64): 64,
    }
    for where, limit in limits.items():
        for itemsize in (2, 4):
            tile = gram.gram_config(where, itemsize, gram.large_tiles(batch, n))
            side, depth = tile.blocks["BLOCK"], tile.blocks["BLOCK_C"]
            operands = 2 * side * depth * itemsize * tile.num_stages
            assert max(operands, 4 * side * side) <= limit * 1024
            row = gram.row_config(where, itemsize, channels)
            assert row.blocks["BLOCK_T"] * row.blocks["BLOCK_C"] <= 32 * 32 * row.num_warps
    blocks = [*repulsion.start_config(n).blocks.values(), *repulsion_steps.direction_config(channels).blocks.values()]
    assert all(b & (b - 1) == 0 for b in (*blocks, gram.best_block(-(-n // 16))))


def test_numbers_beyond_float32() -> None:
    from tokenprune_kernels.triton import repulsion_objective as objective
    from tokenprune_kernels.triton.runtime import float32

    assert objective.weights(1.0, 0.5, 3.0, 1e-6, 1e200) == (2.0, 0.5, 1.5, float32(1e-6), float("inf"))
    assert float32(0.1) == torch.tensor(0.1).item()
    assert [objective.power_of(e) for e in (1.0, 2.0, 1.5)] == [1, 2, 0]
