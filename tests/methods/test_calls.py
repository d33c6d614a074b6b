"""Calls of methods that users guess: budgets in other words, FlashAttention's layout, integers, masks that are none."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.inputs import Batch, arguments, batch, prompt, ragged
from tokenprune_kernels import methods
from tokenprune_kernels.methods import Selection, Stage

STAGES = {stage.name: stage for name in methods.method_names() for stage in methods.get_method(name).stages}
over_methods = pytest.mark.parametrize("name", STAGES)
OF_LAYOUT = [name for name, stage in STAGES.items() if "layout" in inspect.signature(stage.function).parameters]
# Draws for every sample of a call, so that a row is not a call of its own.
BY_ROWS = [name for name in STAGES if name != "random"]


def called(name: str, b: Batch, k: Any, **more: Any) -> Selection:
    stage: Stage = STAGES[name]
    given = arguments(b)
    kept: Selection = stage.function(k=k, **{n: given[source] for n, source in stage.arguments.items()} | more)
    return kept


def assert_same(got: Selection, want: Selection) -> None:
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.counts, want.counts)
    assert got.details.keys() == want.details.keys()
    for n, t in want.details.items():
        torch.testing.assert_close(got.details[n], t, equal_nan=True, rtol=1e-5, atol=1e-6, msg=n)


@over_methods
@pytest.mark.parametrize("spelled", [np.int64(4), torch.tensor(4), 0.13, [4, 4, 4]])
def test_one_budget_in_other_words(name: str, spelled: Any) -> None:
    """0.13 of the longest sample's 30 tokens, and each of the three samples has 4."""
    b = batch(ragged(0, torch.float32))
    assert b.mask.shape == (3, 30)
    seeded = {"generator": torch.Generator().manual_seed(3)} if name == "random" else {}
    got = called(name, b, spelled, **seeded)
    seeded = {"generator": torch.Generator().manual_seed(3)} if name == "random" else {}
    assert_same(got, called(name, b, 4, **seeded))


@pytest.mark.parametrize("name", BY_ROWS)
def test_a_budget_for_each_sample(name: str) -> None:
    """Each is a call of its own; what is shorter ends in -1 (indices) or 0."""
    b = batch(ragged(0, torch.float32))
    numbers = [6, 2, 6]
    for given in (numbers, torch.tensor(numbers), np.array(numbers)):
        kept = called(name, b, given)
        assert kept.indices.shape == (3, 6)
        for k in (6, 2):
            rows = [i for i, number in enumerate(numbers) if number == k]
            alone = called(name, b, k)
            assert torch.equal(kept.indices[rows, :k], alone.indices[rows])
            assert bool((kept.indices[rows, k:] == -1).all())
            assert torch.equal(kept.counts[rows], alone.counts[rows])
            if alone.merged is not None:
                assert kept.merged is not None
                torch.testing.assert_close(kept.merged[rows, :k], alone.merged[rows])
                assert kept.sizes is not None
                assert bool((kept.sizes[rows, k:] == 0).all())
            for n, t in alone.details.items():
                cut = tuple(slice(0, size) for size in t.shape[1:])
                torch.testing.assert_close(kept.details[n][(rows, *cut)], t[rows], equal_nan=True, rtol=1e-5, atol=1e-6)


@over_methods
def test_budgets_that_are_none(name: str) -> None:
    b = batch([prompt(0, torch.float32)] * 2)
    for value, error, message in (
        (True, TypeError, "k must be an int"),
        ("3", TypeError, "k must be an int"),
        (7.0, ValueError, r"k must lie in \(0, 1\] where it is a float, .*; type k=7 for a number of tokens"),
        ([1, 2, 3], ValueError, r"k must have one number per sample \(B = 2\), got 3"),
        ([1, -2], ValueError, "k must be non-negative, got -2"),
        (torch.ones(2, device="meta"), TypeError, r"k must be known to the host, .* type k\.tolist\(\)"),
    ):
        with pytest.raises(error, match=message):
            called(name, b, value)


def test_other_numbers_of_samples_are_named_before_rows_are_taken() -> None:
    with pytest.raises(ValueError, match=r"scope: saliency must have one entry per sample \(B = 2\), got \[3, 5\]"):
        methods.scope(torch.rand(2, 5, 3), torch.rand(3, 5), [1, 2])


@pytest.mark.parametrize("name", OF_LAYOUT)
def test_flash_attentions_layout_gives_the_same(name: str) -> None:
    b = batch(ragged(0, torch.float32))
    turned = {n: t.transpose(1, 2) for n, t in (("query", b.query), ("key", b.key)) if n in STAGES[name].arguments}
    assert turned
    for k in (5, [5, 2, 5], 0.2):
        assert_same(called(name, b, k, layout="blhd", **turned), called(name, b, k))
    with pytest.raises(ValueError, match=rf"^{name}: layout must be one of bhld, blhd, got 'bshd'"):
        called(name, b, 5, layout="bshd")


def test_every_method_that_reads_attention_takes_the_layout() -> None:
    reading = [n for n, s in STAGES.items() if {"query", "key"} & set(inspect.signature(s.function).parameters)]
    assert reading == OF_LAYOUT
    assert len(OF_LAYOUT) == 7


MASKED = [
    (name, p)
    for name, stage in STAGES.items()
    for p in inspect.signature(stage.function).parameters
    if p.endswith("mask")
]


@pytest.mark.parametrize(("name", "mask"), MASKED, ids=[f"{name}-{mask}" for name, mask in MASKED])
def test_masks_of_numbers_are_refused_by_name(name: str, mask: str) -> None:
    b = batch(ragged(0, torch.float32))
    given = arguments(b)[STAGES[name].arguments[mask]]
    with pytest.raises(TypeError, match=rf"^{name}: {mask} must be bool, got int64; type {mask}\.bool\(\)"):
        called(name, b, 4, **{mask: given.long()})


@over_methods
def test_narrower_integers_are_taken_for_int64(name: str) -> None:
    b = batch(ragged(0, torch.float32))
    given = arguments(b)
    narrow = {
        n: given[source].int()
        for n, source in STAGES[name].arguments.items()
        if isinstance(given[source], Tensor) and given[source].dtype == torch.int64
    }
    seeded = [{"generator": torch.Generator().manual_seed(3)} if name == "random" else {} for _ in range(2)]
    assert_same(called(name, b, 5, **narrow, **seeded[0]), called(name, b, 5, **seeded[1]))


@pytest.mark.parametrize("name", ["adaptprune", "sts_structure"])
def test_positions_of_every_sample(name: str) -> None:
    b = batch([prompt(i, torch.float32) for i in range(2)])
    shared = b.positions[0]
    for k in (5, [5, 3]):
        assert_same(
            called(name, b, k, positions=shared), called(name, b, k, positions=shared.float().expand(2, -1, -1))
        )


WRONG = [
    (methods.evs, (torch.rand(6, 4), torch.zeros(2, 6)), {"grid": (2, 3)},
     r"features must have shape \[B, V, C\], got \[6, 4\]; type features\.unsqueeze\(0\)"),
    (methods.vidcom2, (torch.rand(2, 6, 4), torch.zeros(2, 6)), {},
     r"groups must be int64, got float32; type groups\.long\(\)"),
    (methods.cdpruner, ([torch.rand(6, 4)], torch.rand(1, 2, 4)), {},
     r"features must be a tensor, got list; type features\[i\]"),
    (methods.scope, (torch.rand(1, 6, 4), torch.rand(6)), {}, r"saliency must have shape \[B, V\], got \[6\]; type "),
    (methods.fastv, (torch.rand(2, 6, 4), torch.rand(2, 6, 4)), {},
     r"query must have shape \[B, Hq, T, D\], got \[2, 6, 4\]"),
    (methods.dart, (torch.rand(1, 2, 6, 4), *[torch.rand(1, 6, 4)] * 2), {"key_indices": None, "query_positions": None},
     "key_indices must be a tensor, got None"),
    (methods.evs, (torch.rand(1, 6, 4), torch.zeros(1, 6, dtype=torch.int64)), {"grid": 6},
     r"grid must be \(height, width\)"),
    (methods.evs, (torch.rand(1, 6, 4), torch.zeros(1, 6, dtype=torch.int64)), {"grid": (-1, 2)},
     r"grid must be non-negative, got \(-1, 2\)"),
    (methods.visionzip, (torch.rand(1, 6, 4), torch.rand(1, 6)), {"contextual_ratio": "a"},
     "contextual_ratio must be a number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "given", "more", "message"), WRONG, ids=[f"{m.__name__}-{text.split()[0]}" for m, _, _, text in WRONG]
)
@pytest.mark.parametrize("k", [2, 0.5])
def test_an_argument_that_is_none_is_named(method: Any, given: Any, more: Any, message: str, k: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{method.__name__}: {message}"):
        method(*given, k, **more)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        methods.fastv(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 5, 4))
    with pytest.raises(ValueError, match="first must be one of"):
        methods.divprune(torch.rand(1, 5, 3), 2, first="last")
