"""repulsion_sample: exact picks on exact inputs, each step replayed otherwise, ties, special cases and edge cases."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing import gpu_backend
from testing.cases import DTYPES, GPU_BACKENDS, compiled, dtypes_of, over_backends, over_capabilities, over_dtypes
from testing.process import printed
from tokenprune_kernels import reference

over_aggregates = pytest.mark.parametrize("aggregate", ["max", "sum"])
over_potentials = pytest.mark.parametrize("potential", ["cosine", "riesz", "gaussian"])


def exact_features(generator: torch.Generator, batch: int, n: int, channels: int) -> Tensor:
    """Entries 0 and +-1 with 0, 1, 4, 16 or 64 of them not zero: norms are powers of two, cosines multiples of 1/64."""
    sizes = torch.tensor([s for s in (0, 1, 4, 16, 64) if s <= channels])
    order = torch.rand(batch, n, channels, generator=generator).argsort(-1)
    size = sizes[torch.randint(len(sizes), (batch, n, 1), generator=generator)]
    sign = torch.randint(2, (batch, n, channels), generator=generator) * 2.0 - 1
    return torch.where(order < size, sign, 0.0)


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert got[0].tolist() == want[0].tolist()
    assert got[1].tolist() == want[1].tolist()


def exact_case(seed: int, n: int, channels: int) -> tuple[Tensor, int, dict[str, Any]]:
    """A random call on which float32 makes no rounding error that could change a pick."""
    generator = torch.Generator().manual_seed(seed)

    def chance() -> bool:
        return bool(torch.rand((), generator=generator) < 0.5)

    features = exact_features(generator, 2, n, channels)
    options: dict[str, Any] = {"aggregate": "sum" if chance() else "max", "first": "isolated" if chance() else "index"}
    if options["aggregate"] == "max" and chance():
        # 1 / (r2 + 1) is distinct for distinct r2 and falls with it, so that rounding changes no comparison.
        options |= {"potential": "riesz", "exponent": 2.0, "epsilon": 1.0}
        if chance():
            options["positions"] = torch.randint(5, (2, n, 2), generator=generator).float()
    elif chance():
        options["energy"] = torch.randint(-8, 9, (2, n), generator=generator) / 8
    if chance():
        options["mask"] = torch.rand(2, n, generator=generator) < 0.7
    if chance():
        options["seed_indices"] = torch.randint(-1, n, (2, 5), generator=generator)
    if chance():
        features[:, generator.initial_seed() % n] = torch.nan if chance() else torch.inf
    return features, int(torch.randint(n + 4, (), generator=generator)), options


@over_backends
@over_dtypes
@settings(deadline=None, max_examples=25, print_blob=True)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 40), channels=st.sampled_from([1, 3, 4, 17, 64, 72, 80]))
def test_exact_inputs(dtype: torch.dtype, backend: str, seed: int, n: int, channels: int) -> None:
    features, k, options = exact_case(seed, n, channels)
    got = tp.repulsion_sample(features.to(dtype), k, **options, backend=backend)
    same(got, reference.repulsion_sample(features.double(), k, **options))


@pytest.mark.parametrize("seed", range(12))
def test_exact_inputs_of_a_real_size(seed: int) -> None:
    """Long enough for predicted rows, several blocks and both threads."""
    features, k, options = exact_case(seed, 500, 256)
    got = tp.repulsion_sample(features, max(k, 200), **options)
    same(got, reference.repulsion_sample(features.double(), max(k, 200), **options))


def potential_bounds(features: Tensor, positions: Tensor | None, potential: str) -> tuple[Tensor, Tensor]:
    """Lowest and highest phi(i, j) [N, N] that a correct computation can find, in float64.

    An inner product of two unit vectors of length C that were normalised in the arithmetic dtype errs by at most about
    2 (C + 8) roundings; phi grows with the cosine, and r2 and phi add a few roundings.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1, eps=1e-12)
    u = torch.finfo(torch.float64 if features.dtype == torch.float64 else torch.float32).eps / 2
    delta = 2 * (features.shape[-1] + 8) * u
    bounds = []
    for sign in (-1, 1):
        cosine = unit @ unit.T + sign * delta
        r2 = 2 * (1 - cosine)
        if positions is not None:
            r2 = r2 + (positions.double().unsqueeze(1) - positions.double()).square().sum(-1)
        r2 = r2 - sign * 8 * u * r2.abs()
        if potential == "cosine":
            phi = cosine
        elif potential == "riesz":
            phi = 1 / (r2.clamp_min(0) ** 0.75 + 0.01)
        else:
            phi = torch.exp(-r2 / (2 * 0.5**2))
        bounds.append(phi + sign * 16 * u * phi.abs())
    return bounds[0], bounds[1]


def assert_replays(dtype: torch.dtype, backend: str, aggregate: str, potential: str, with_positions: bool) -> None:
    """No step leaves behind a token that was certainly better than the pick."""
    n, k = 230, 60  # more than two predictions run among
    features = (torch.randn(1, n, 64) + 0.5 * torch.randn(64)).to(dtype)
    positions = torch.rand(1, n, 2) if with_positions else None
    options = {"exponent": 1.5, "epsilon": 0.01, "sigma": 0.5, "aggregate": aggregate, "potential": potential}
    picks, counts = tp.repulsion_sample(features, k, positions=positions, first="index", **options, backend=backend)
    order = picks[0]
    assert counts.tolist() == [k]
    assert order[0] == 0
    assert len(set(order.tolist())) == k
    low, high = (
        phi[:, order].cummax(1).values if aggregate == "max" else phi[:, order].cumsum(1)
        for phi in potential_bounds(features[0], None if positions is None else positions[0], potential)
    )
    if aggregate == "sum":  # k additions of terms of size <= |phi|
        u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
        slack = 2 * k * u * torch.maximum(low.abs(), high.abs()).amax()
        low, high = low - slack, high + slack
    for step in range(1, k):
        left = high[:, step - 1].index_fill(0, order[:step], torch.inf)
        assert low[order[step], step - 1] <= left.min(), f"step {step}"


@over_backends
@over_dtypes
@over_aggregates
@over_potentials
@pytest.mark.parametrize("with_positions", [False, True])
def test_replay(dtype: torch.dtype, backend: str, aggregate: str, potential: str, with_positions: bool) -> None:
    assert_replays(dtype, backend, aggregate, potential, with_positions)


@over_backends
@over_dtypes
def test_first_pick(dtype: torch.dtype, backend: str) -> None:
    features = torch.randn(4, 90, 72).to(dtype)
    mask = torch.rand(4, 90) < 0.8
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    total = torch.nn.functional.normalize(torch.where(mask.unsqueeze(-1), unit, 0).sum(1), dim=-1)
    outlier = (unit @ total.unsqueeze(-1)).squeeze(-1)
    others = mask.unsqueeze(1) & ~torch.eye(90, dtype=torch.bool)
    isolated = torch.where(others, unit @ unit.mT, -torch.inf).amax(-1)
    # The sum of n unit vectors adds n roundings of 1 to a vector whose norm exceeds 1 here.
    for first, objective, delta in (("outlier", outlier, 2 * (90 + 72 + 8) * u), ("isolated", isolated, 4 * 80 * u)):
        pick = tp.repulsion_sample(features, 1, mask=mask, first=first, backend=backend)[0]
        assert mask.gather(1, pick).all()
        best = torch.where(mask, objective, torch.inf).amin(1)
        assert (objective.gather(1, pick).squeeze(1) <= best + 2 * delta).all(), first
    lowest = tp.repulsion_sample(features, 1, mask=mask, first="index", backend=backend)[0]
    assert lowest.squeeze(1).tolist() == mask.int().argmax(1).tolist()


@over_backends
@pytest.mark.parametrize("n", [65, 3072, 3073], ids=["few tokens", "all cosines stored", "cosines block by block"])
def test_isolated_start_over_many_tokens(n: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel stores the cosines of all pairs up to 3072 tokens; cosines here are exact, so the picks are too."""
    if backend == "triton" and not gpu_backend.has_gpu():  # the interpreter needs a minute for so many
        from tokenprune_kernels.triton import gram

        assert gram.GRAM_TOKENS == 3072
        monkeypatch.setattr(gram, "GRAM_TOKENS", 192)
        n = {65: 65, 3072: 192, 3073: 193}[n]
    generator = torch.Generator().manual_seed(n)
    features = exact_features(generator, 1, n, 40)
    mask = torch.rand(1, n, generator=generator) < 0.9
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    others = mask & ~torch.eye(n, dtype=torch.bool)
    start = torch.where(mask, torch.where(others, unit @ unit.mT, -torch.inf).amax(-1), torch.inf)
    indices, counts = tp.repulsion_sample(features, 6, mask=mask, first="isolated", backend=backend)
    assert counts.tolist() == [6]
    assert indices[0, 0] == (start == start.amin()).int().argmax()
    for step in range(1, 6):
        chosen = indices[0, :step]
        largest = (unit @ unit[:, chosen].mT).amax(-1)
        largest = torch.where(mask, largest, torch.inf).scatter(1, chosen.unsqueeze(0), torch.inf)
        assert indices[0, step] == (largest == largest.amin()).int().argmax()


@over_aggregates
@over_potentials
@pytest.mark.parametrize("channels", [1, 72, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_tokens_tie(dtype: torch.dtype, channels: int, potential: str, aggregate: str) -> None:
    """Copies of a token have bitwise the same U whatever computed it, so the copy with the lower index goes first."""
    base = torch.randn(1, 75, channels).to(dtype)
    coordinates = torch.rand(1, 75, 2)
    picks, counts = tp.repulsion_sample(
        base.repeat(1, 3, 1), 225, positions=coordinates.repeat(1, 3, 1), potential=potential, aggregate=aggregate,
        exponent=3.0, seed_indices=torch.tensor([[7, 11]]),
    )  # fmt: skip
    assert counts.item() == 223
    step = torch.full((225,), -1).scatter(0, picks[0, :223], torch.arange(223))
    first, second, third = step.view(3, 75)
    seeds = torch.tensor([7, 11])
    assert first[seeds].tolist() == [-1, -1]
    assert (first < second).all()
    assert (second < third).all()


@over_backends
def test_large_riesz_exponent_is_max_min(backend: str) -> None:
    """In the limit the sum of potentials is its largest term."""
    features = torch.randn(2, 40, 16, dtype=dtypes_of(backend)[-1])
    max_min = tp.repulsion_sample(features, 8, backend=backend)
    options = {"potential": "riesz", "epsilon": 0.0, "backend": backend}
    # float32 has room for the potentials of the distances that matter at r2 around 1, and a smaller exponent.
    limit = {"exponent": 200.0, "feature_weight": 0.5} if backend in GPU_BACKENDS else {"exponent": 600.0}
    same(tp.repulsion_sample(features, 8, aggregate="sum", **limit, **options), max_min)
    same(tp.repulsion_sample(features, 8, exponent=2.0, **options), max_min)


@over_backends
@over_aggregates
def test_a_sigma_whose_square_overflows_makes_all_tokens_equal(backend: str, aggregate: str) -> None:
    options = {"potential": "gaussian", "sigma": 1e200, "first": "index", "aggregate": aggregate}
    indices, _ = tp.repulsion_sample(torch.randn(1, 9, 4), 5, backend=backend, **options)
    assert indices.tolist() == [[0, 1, 2, 3, 4]]


@over_backends
def test_maximal_marginal_relevance(backend: str) -> None:
    dtype = dtypes_of(backend)[-1]
    features, relevance, trade = torch.randn(1, 50, 16, dtype=dtype), torch.rand(50, dtype=dtype), 0.5
    cosine = torch.nn.functional.normalize(features[0], dim=-1)
    cosine = cosine @ cosine.T
    picks = [int(relevance.argmax())]
    while len(picks) < 12:
        marginal = relevance - trade * cosine[picks].amax(0)
        marginal[picks] = -torch.inf
        picks.append(int(marginal.argmax()))
    got = tp.repulsion_sample(features, 12, energy=-relevance.unsqueeze(0) / trade, backend=backend)
    assert got[0].tolist() == [picks]


@over_backends
@over_aggregates
def test_everything_is_picked_once(backend: str, aggregate: str) -> None:
    picks, counts = tp.repulsion_sample(torch.randn(2, 33, 5), 40, aggregate=aggregate, backend=backend)
    assert counts.tolist() == [33, 33]
    assert picks[:, :33].sort().values.tolist() == [list(range(33))] * 2
    assert (picks[:, 33:] == -1).all()


@over_backends
@over_aggregates
def test_nothing_to_pick(backend: str, aggregate: str) -> None:
    features = torch.randn(2, 7, 3)

    def call(features: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        return tp.repulsion_sample(features, k, aggregate=aggregate, backend=backend, **options)

    nothing = torch.zeros(2, 7, dtype=torch.bool)
    same(call(features, 3, mask=nothing), (torch.full((2, 3), -1), torch.zeros(2)))
    same(call(features, 0), (torch.empty(2, 0), torch.zeros(2)))
    same(call(features[:, :0], 2), (torch.full((2, 2), -1), torch.zeros(2)))
    same(call(features[:0], 2), (torch.empty(0, 2), torch.empty(0)))
    every_token = torch.arange(7).repeat(2, 1)
    same(call(features, 2, seed_indices=every_token), (torch.full((2, 2), -1), torch.zeros(2)))
    same(call(features[:, :1], 2, first="isolated"), (torch.tensor([[0, -1]] * 2), torch.ones(2)))


@over_backends
@over_aggregates
def test_seeds(backend: str, aggregate: str) -> None:
    """Repeated and missing entries change nothing (on GPUs bad ones neither); a masked seed still repels."""
    features = torch.randn(1, 40, 8, dtype=dtypes_of(backend)[-1])
    call = {"aggregate": aggregate, "backend": backend}
    plain = tp.repulsion_sample(features, 10, seed_indices=torch.tensor([[3, 17]]), **call)
    padded = tp.repulsion_sample(features, 10, seed_indices=torch.tensor([[17, -1, 3, 17, -1]]), **call)
    same(padded, plain)
    assert not {3, 17} & set(plain[0][0].tolist())
    hidden = torch.ones(1, 40, dtype=torch.bool)
    hidden[0, 3] = False
    same(tp.repulsion_sample(features, 10, seed_indices=torch.tensor([[3, 17]]), mask=hidden, **call), plain)
    none = tp.repulsion_sample(features, 10, seed_indices=torch.tensor([[-1, -1]]), **call)
    same(none, tp.repulsion_sample(features, 10, **call))
    for bad in (-2, 40):
        if backend in GPU_BACKENDS:
            wrong = torch.tensor([[17, bad, 3, 2**40 + 3, -(2**40) - 3]])
            same(tp.repulsion_sample(features, 10, seed_indices=wrong, **call), plain)
            continue
        with pytest.raises(IndexError, match=r"\[-1, 40\)"):
            tp.repulsion_sample(features, 10, seed_indices=torch.tensor([[bad]]), **call)


@over_backends
@over_aggregates
def test_nan_and_infinite_energies(backend: str, aggregate: str) -> None:
    """-inf first, then numbers, then +inf, NaN last; -0.0 ties with 0.0."""
    energy = torch.tensor([[torch.nan, torch.inf, 0.0, -torch.inf, -0.0, torch.inf, torch.nan]])
    features = torch.eye(7).unsqueeze(0)  # every cosine is 0
    picks, _ = tp.repulsion_sample(features, 7, energy=energy, aggregate=aggregate, backend=backend)
    assert picks.tolist() == [[3, 2, 4, 1, 5, 0, 6]]


@over_aggregates
@over_potentials
def test_threads_and_batch_do_not_matter(aggregate: str, potential: str) -> None:
    features = torch.randn(3, 700, 136)
    options = {"aggregate": aggregate, "potential": potential, "positions": torch.rand(3, 700, 3), "first": "isolated"}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(tp.repulsion_sample(features, 150, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same(other, results[0])
    alone = {**options, "positions": options["positions"][1:2]}
    assert tp.repulsion_sample(features[1:2], 150, **alone)[0].tolist() == results[0][0][1:2].tolist()


@compiled
@over_capabilities
def test_every_capability(capability: str) -> None:
    """A capability that the machine lacks falls back to the best one it has, which passes just the same."""
    selected = "real_size or (identical and float32 and 72) or (test_replay and float32 and cpu)"
    told = printed(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selected,
        TOKENPRUNE_CPU_CAPABILITY=capability,
    )  # fmt: skip
    assert " passed" in told


PEAK = """
import resource, torch, tokenprune_kernels as tp
torch.manual_seed(0)
features = torch.randn(1, 12000, 16)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tp.repulsion_sample(features[:, :64], 8, aggregate="sum")
before = peak()
for aggregate in ("max", "sum"):
    tp.repulsion_sample(features, 64, aggregate=aggregate, first="isolated")
print(peak() - before)
"""


@compiled
def test_no_gram_matrix_of_many_tokens() -> None:
    """N x N floats would take 550 MiB here; the rows that are kept take 24 MiB and the rest is of the order of N."""
    assert float(printed("-c", PEAK, TOKENPRUNE_POISON=None)) < 100
