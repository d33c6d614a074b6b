"""merge_tokens: against the contract's words in float64 and plain loops; ties, thresholds, NaN, weights, masks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_kernels as tp
from testing.cases import (
    GPU_BACKENDS,
    assert_as_good_as_torch,
    backends_of,
    compiled,
    dtypes_of,
    over_capabilities,
    over_dtypes,
    run_with_capability,
)
from testing.op_inputs import features

NAN, INF = math.nan, math.inf
MERGING = backends_of("merge_tokens")
over_merging = pytest.mark.parametrize("backend", MERGING)
over_metrics = pytest.mark.parametrize("metric", ["cosine", "euclidean"])


def likeness(x: np.ndarray, y: np.ndarray, metric: str) -> float:
    if metric == "euclidean":
        return -math.sqrt(float(((x - y) ** 2).sum()))
    norms = [max(math.sqrt(float((v * v).sum())), 1e-12) for v in (x, y)]
    return float((x / norms[0] * (y / norms[1])).sum())


def literal_assignment(
    keys: Tensor, targets: Tensor, mask: Tensor | None, threshold: float | None, metric: str, include_targets: bool
) -> Tensor:
    """Who joins which target, as the contract says it, token by token."""
    x = keys.double().numpy()
    batch, n = x.shape[:2]
    joined = np.full((batch, n), -1)
    for b in range(batch):
        own = {int(t): c for c, t in enumerate(targets[b]) if t >= 0}
        for i in range(n):
            if i in own:
                joined[b, i] = own[i] if include_targets else -1
                continue
            if mask is not None and not mask[b, i]:
                continue
            best = -INF
            for target, c in own.items():  # in the order of slots
                value = likeness(x[b, i], x[b, target], metric)
                if value > best or (joined[b, i] == -1 and value == best):
                    best, joined[b, i] = value, c
            if threshold is not None and not best >= (threshold if metric == "cosine" else -threshold):
                joined[b, i] = -1
    return torch.from_numpy(joined)


def literal_means(values: Tensor, joined: Tensor, weights: Tensor | None, slots: int) -> tuple[Tensor, Tensor]:
    """The mean of what joined each target, in float64, and the sum of its weights."""
    x = values.double().numpy()
    batch, n, channels = x.shape
    merged, sizes = np.zeros((batch, slots, channels)), np.zeros((batch, slots))
    for b in range(batch):
        for c in range(slots):
            total = np.zeros(channels)
            for i in range(n):
                weight = 1.0 if weights is None else float(weights[b, i])
                if joined[b, i] == c and weight > 0:
                    total += weight * x[b, i]
                    sizes[b, c] += weight
            if sizes[b, c] > 0:
                merged[b, c] = total / sizes[b, c]
    return torch.from_numpy(merged), torch.from_numpy(sizes)


def kept(batch: int, n: int, k: int, generator: torch.Generator | None = None) -> Tensor:
    """k unique tokens of each sample in any order, some of them replaced by -1."""
    order = torch.rand(batch, n, generator=generator).argsort(-1)[:, :k]
    order = torch.nn.functional.pad(order, (0, k - order.shape[1]), value=-1)
    return torch.where(torch.rand(order.shape, generator=generator) < 0.85, order, -1)


def check(backend: str, values: Tensor, targets: Tensor, *, keys: Tensor | None = None, **options) -> Tensor:
    """The assignment exactly, the means and sizes as good as plain PyTorch's; returns the assignment."""
    merged, sizes, joined = tp.merge_tokens(values, targets, keys=keys, backend=backend, **options)
    if options.get("assignment") is not None:
        want = options["assignment"]
    else:
        asked = {"mask": None, "threshold": None, "metric": "cosine", "include_targets": True} | options
        asked.pop("weights", None)
        want = literal_assignment(values if keys is None else keys, targets, **asked)
    assert joined.dtype == torch.int64
    assert torch.equal(joined, want)
    exact, exact_sizes = literal_means(values, want, options.get("weights"), targets.shape[1])
    plain = tp.reference.merge_tokens(values, targets, assignment=want, weights=options.get("weights"))
    scale = values[values.isfinite()].double().abs().max().item() if values.isfinite().any() else 1.0
    assert_as_good_as_torch(merged, exact, plain[0], scale=scale)
    assert_as_good_as_torch(sizes, exact_sizes, plain[1], scale=max(exact_sizes.abs().max().item(), 1.0))
    return joined


@over_merging
@over_dtypes
@over_metrics
@pytest.mark.parametrize("channels", [1, 5, 72, 80])
def test_merge_tokens(backend: str, dtype: torch.dtype, metric: str, channels: int) -> None:
    """Keys whose cosines and distances are exact, so that every token has one right target, ties among them."""
    for batch, n, k in [(2, 50, 7), (1, 97, 40), (2, 20, 1), (1, 8, 8)]:
        keys = features(batch, n, channels, dtype=dtype, seed=n)
        values = torch.randn(batch, n, 9).to(dtype)
        check(backend, values, kept(batch, n, k), keys=keys, metric=metric)
        check(backend, keys, kept(batch, n, k), metric=metric)


@over_merging
@over_metrics
def test_ties_go_to_the_lowest_slot(backend: str, metric: str) -> None:
    same = torch.ones(1, 70, 8)
    targets = torch.tensor([[-1, 9, 3, 60]])
    joined = check(backend, same, targets, metric=metric)
    assert set(joined[0].tolist()) == {1, 2, 3}
    assert (joined[0] == 1).sum() == 68
    many = torch.arange(69, 29, -1).unsqueeze(0)  # more slots than a panel has rows
    assert (check(backend, same, many, metric=metric)[0, :30] == 0).all()


@over_merging
@over_dtypes
def test_thresholds_are_inclusive(backend: str, dtype: torch.dtype) -> None:
    keys = torch.zeros(1, 5, 4, dtype=dtype)
    keys[0, :, 0] = 1
    keys[0, 1, 1:] = 1  # cosine 1/2 with the others, distance sqrt(3)
    keys[0, 3] = torch.tensor([4, 0, 0, 0])  # distance 3
    keys[0, 4] = torch.tensor([0, 2, 0, 0])  # cosine 0
    targets = torch.tensor([[0]])
    for threshold, want in [
        (0.5, [0, 0, 0, 0, -1]), (0.51, [0, -1, 0, 0, -1]), (0.0, [0] * 5), (1.0, [0, -1, 0, 0, -1]),
        (1.5, [0, -1, -1, -1, -1]), (-INF, [0] * 5), (NAN, [0, -1, -1, -1, -1]),
    ]:  # fmt: skip
        assert check(backend, keys, targets, threshold=threshold)[0].tolist() == want
    for threshold, want in [
        (3.0, [0, 0, 0, 0, 0]), (2.99, [0, 0, 0, -1, 0]), (0.0, [0, -1, 0, -1, -1]), (-1.0, [0, -1, -1, -1, -1]),
        (INF, [0] * 5), (NAN, [0, -1, -1, -1, -1]),
    ]:  # fmt: skip
        assert check(backend, keys, targets, threshold=threshold, metric="euclidean")[0].tolist() == want


@over_merging
def test_without_targets_of_their_own(backend: str) -> None:
    """VisionZip: the contextual tokens are the mean of the others."""
    values = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [5.0, 0.0]]])
    merged, sizes, joined = tp.merge_tokens(
        values, torch.tensor([[0, -1, 2]]), include_targets=False, backend=backend
    )  # fmt: skip
    assert joined.tolist() == [[-1, 0, -1, 0]]
    assert sizes.tolist() == [[2, 0, 0]]
    assert merged.tolist() == [[[4, 0], [0, 0], [0, 0]]]


@over_merging
def test_masked_targets_keep_their_entries(backend: str) -> None:
    values, targets = torch.randn(2, 30, 16), kept(2, 30, 6)
    mask = torch.rand(2, 30) < 0.5
    mask.scatter_(1, targets.clamp_min(0), False)
    joined = check(backend, features(2, 30, 16, dtype=torch.float32, seed=0), targets, mask=mask)
    for b in range(2):
        for c, target in enumerate(targets[b].tolist()):
            assert target < 0 or joined[b, target] == c
    assert tp.merge_tokens(values, targets, mask=torch.zeros_like(mask), backend=backend)[1].max() == 1


@over_merging
@over_dtypes
def test_weights(backend: str, dtype: torch.dtype) -> None:
    values, targets = features(2, 40, 24, dtype=dtype, seed=1), kept(2, 40, 6)
    weights = torch.randint(-2, 4, (2, 40)).to(dtype)
    weights[0, 3] = weights[1, 5] = NAN
    check(backend, values, targets, weights=weights)
    nothing = torch.where(weights > 0, 0.0, weights.double())
    merged, sizes, _ = tp.merge_tokens(values, targets, weights=nothing.to(dtype), backend=backend)
    assert not merged.any()
    assert not sizes.any()


@over_merging
def test_a_token_of_weight_zero_contributes_nothing_whatever_its_values(backend: str) -> None:
    values, targets = torch.randn(1, 20, 8), torch.tensor([[0, 1]])
    joined = torch.randint(0, 2, (1, 20))
    weights = torch.ones(1, 20)
    weights[0, ::4] = torch.tensor([0.0, -0.0, -1.0, NAN, -INF])
    clean = torch.where(weights.unsqueeze(-1) > 0, values, 0)
    values[0, ::4] = torch.tensor([NAN, INF, -INF, NAN, 7.0]).unsqueeze(-1)
    for spoiled, w in ((values, weights), (clean, weights)):
        got = tp.merge_tokens(spoiled, targets, assignment=joined, weights=w, backend=backend)
        want = tp.merge_tokens(clean, targets, assignment=joined, weights=w, backend=backend)
        assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))


@over_merging
@over_dtypes
def test_a_given_assignment_is_used_as_it_is(backend: str, dtype: torch.dtype) -> None:
    """Also where targets, mask or threshold would have said something else."""
    values = torch.randn(2, 40, 24).to(dtype)
    joined = torch.randint(-1, 5, (2, 40))
    targets = torch.tensor([[0, 1, -1, 2, 3], [-1] * 5])
    options = {"mask": torch.zeros(2, 40, dtype=torch.bool), "threshold": 2.0, "include_targets": False}
    check(backend, values, targets, assignment=joined)
    got = tp.merge_tokens(values, targets, assignment=joined, **options, backend=backend)
    want = tp.merge_tokens(values, targets, assignment=joined, backend=backend)
    assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))


@over_merging
def test_merging_again_with_the_sizes_is_merging_once(backend: str) -> None:
    values = torch.randint(-9, 10, (1, 60, 5)).double() if backend not in GPU_BACKENDS else torch.randn(1, 60, 5)
    first, second = torch.randint(0, 12, (1, 60)), torch.randint(0, 4, (1, 12))
    merged, sizes, _ = tp.merge_tokens(values, torch.arange(12).unsqueeze(0), assignment=first, backend=backend)
    again, total, _ = tp.merge_tokens(
        merged, torch.arange(4).unsqueeze(0), assignment=second, weights=sizes, backend=backend
    )
    once, size, _ = tp.merge_tokens(
        values, torch.arange(4).unsqueeze(0), assignment=second.gather(1, first), backend=backend
    )
    assert torch.equal(total, size)
    torch.testing.assert_close(again, once)


@over_merging
@over_metrics
@pytest.mark.parametrize("special", [NAN, INF, -INF, 1e30, -0.0])
def test_special_keys(backend: str, metric: str, special: float) -> None:
    """Of tokens, and of a target: NaN resembles nothing, and what overflows is normalised first."""
    for channel in (slice(None), slice(0, 1)):
        keys = features(2, 60, 16, dtype=torch.float32, seed=3)
        keys[:, ::7, channel] = special
        values = torch.randn(2, 60, 4)
        for targets in (torch.tensor([[1, 2, 3]] * 2), torch.tensor([[7, 2, 3], [-1, 14, 5]])):
            got = tp.merge_tokens(values, targets, keys=keys, metric=metric, backend=backend)[2]
            want = tp.merge_tokens(values, targets, keys=keys, metric=metric, backend="reference")[2]
            assert torch.equal(got, want)
            if special != special:
                others = [i for i in range(0, 60, 7) if i not in targets[0]]
                assert (got[0, others] == -1).all()


@over_merging
def test_keys_and_weights_of_other_dtypes(backend: str) -> None:
    wide = torch.float32 if backend in GPU_BACKENDS else torch.float64
    values, targets = torch.randn(2, 30, 8).half(), kept(2, 30, 5)
    keys = features(2, 30, 12, dtype=wide, seed=4)
    check(backend, values, targets, keys=keys, weights=torch.rand(2, 30, dtype=wide), metric="euclidean")
    merged, sizes, _ = tp.merge_tokens(values, targets, keys=keys, backend=backend)
    assert (merged.dtype, sizes.dtype) == (torch.float16, torch.float32)


@over_merging
@pytest.mark.parametrize("value", [-2, 10, 2**40, -(2**63)])
@pytest.mark.parametrize("which", ["targets", "assignment"])
def test_indices_out_of_range(backend: str, value: int, which: str) -> None:
    values = torch.randn(2, 10, 4)
    arguments = {"targets": torch.tensor([[0, 3], [9, -1]]), "assignment": torch.randint(-1, 2, (2, 10))}
    arguments[which][1, 1] = value
    if backend in GPU_BACKENDS:  # counts as -1
        legal = {**arguments, which: torch.where(arguments[which] == value, -1, arguments[which])}
        got = tp.merge_tokens(values, **arguments, backend=backend)
        assert all(map(torch.equal, got, tp.merge_tokens(values, **legal, backend=backend)))
        return
    with pytest.raises(IndexError):
        tp.merge_tokens(values, **arguments, backend=backend)


@compiled
def test_index_error_names_the_op_and_the_value() -> None:
    with pytest.raises(IndexError, match=r"merge_tokens: targets must lie in \[-1, 3\), got 3"):
        torch.ops.tokenprune.merge_tokens(torch.rand(1, 3, 2), torch.tensor([[3]]))


@compiled
@over_dtypes
def test_rounding_to_narrow_types_is_to_nearest_even(dtype: torch.dtype) -> None:
    """Every magnitude, from subnormal to infinite, and halves between two neighbours."""
    numbers = torch.cat([torch.randn(3000) * 10.0 ** torch.randint(-9, 6, (3000,)), torch.tensor([65519.0, 65520.0])])
    half_way = torch.arange(-2048, 2048).float() / 2 + 2048
    for wide in (numbers, half_way, half_way * 2.0**-24, half_way * 2.0**-35):
        values = wide.to(dtype).view(1, -1, 1)
        pairs = torch.arange(values.shape[1]).view(1, -1) // 2
        slots = (values.shape[1] + 1) // 2
        got = tp.merge_tokens(values, torch.full((1, slots), -1), assignment=pairs, backend="cpu")[0]
        want = tp.merge_tokens(values, torch.full((1, slots), -1), assignment=pairs, backend="reference")[0]
        assert torch.equal(got, want)


@settings(deadline=None, max_examples=60, print_blob=True)
@given(data=st.data())
def test_random_shapes(data) -> None:
    batch, n = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 60))
    k, channels = data.draw(st.integers(0, 45)), data.draw(st.integers(0, 40))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    keys = features(batch, n, channels, dtype=dtype, seed=data.draw(st.integers(0, 99)))
    values = torch.randn(batch, n, data.draw(st.integers(0, 20)), generator=generator).to(dtype)
    targets = kept(batch, n, k, generator)
    density = data.draw(st.sampled_from([0.0, 0.5, 0.9, None]))
    options = {
        "mask": None if density is None else torch.rand(batch, n, generator=generator) < density,
        "threshold": data.draw(st.sampled_from([None, 0.0, 0.25, 2.0])),
        "metric": data.draw(st.sampled_from(["cosine", "euclidean"])),
        "include_targets": data.draw(st.booleans()),
    }
    weights = torch.randint(-1, 4, (batch, n), generator=generator).to(dtype) if data.draw(st.booleans()) else None
    for backend in MERGING:
        if dtype in dtypes_of(backend) and (backend not in GPU_BACKENDS or batch * n <= 60):
            if values.numel() and targets.numel():
                check(backend, values, targets, keys=keys, weights=weights, **options)
            else:
                merged, sizes, joined = tp.merge_tokens(
                    values, targets, keys=keys, weights=weights, backend=backend, **options
                )
                assert torch.equal(joined, literal_assignment(keys, targets, **options))
                exact, exact_sizes = literal_means(values, joined, weights, k)
                assert merged.shape == exact.shape
                assert torch.equal(sizes.double(), exact_sizes)


PER_CAPABILITY = """
import torch
from testing.cases import DTYPES
from testing.op_inputs import features
from tests.ops.test_merging import check, kept
torch.manual_seed(0)
for dtype in DTYPES:
    for channels in (1, 72, 270):
        for k in (1, 5, 33):
            for metric in ("cosine", "euclidean"):
                keys = features(2, 59, channels, dtype=dtype, seed=k)
                check("cpu", torch.randn(2, 59, 19).to(dtype), kept(2, 59, k), keys=keys, metric=metric)
print("done")
"""


@compiled
@over_capabilities
def test_every_cpu_capability(capability: str) -> None:
    assert run_with_capability(capability, PER_CAPABILITY) == ["done"]
