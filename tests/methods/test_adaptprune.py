"""AdaptPrune against a transcription of its formulas."""

import math

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import (
    Prompt,
    assert_close,
    assert_selected,
    batch,
    decided,
    over_dtypes,
    prompt,
    ragged,
    row_scores,
    widest,
)
from tokenprune_kernels.methods import adaptprune


def _expected(p: Prompt, k: int, **options):
    features, positions, groups = p.numpy("features", "positions", "groups")
    return transcriptions.adaptprune(row_scores(p, "last"), features, positions, k, p.grid, groups, **options)


def _kept(p: Prompt, k: int, **options):
    return adaptprune(
        p.query[None], p.key[None], p.features[None], p.positions[None], k, grid=p.grid, key_indices=p.indices[None],
        groups=p.groups[None], **options,
    )  # fmt: skip


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 9, 29, 30, 36])
def test_selects_what_the_formulas_say(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k))
    kept = _kept(p, k, backend=backend)
    assert [i for i in kept.details["order"][0].tolist() if i >= 0] == expected["order"]
    assert_selected(kept, [expected["order"]])
    assert_close(kept.details["attention"][0], row_scores(p, "last"))
    assert_close(kept.details["corrected"][0], expected["corrected"])


@over_backends
@pytest.mark.parametrize("grid", [(24, 24), (5, 5), (1, 9), (8, 1), (2, 7)], ids=str)
def test_centre_prior_is_the_papers_table(grid, backend):
    """exp(-(y^2 + x^2) / (2 sigma^2)) over evenly spaced coordinates, divided by its maximum."""
    p = prompt(1, widest(backend), grid=grid)
    corrected = _kept(p, 1, backend=backend).details["corrected"][0]
    assert_close(corrected, row_scores(p, "last") * transcriptions.centre_prior(p.positions.numpy(), grid))


@over_backends
@pytest.mark.parametrize("k", [6, 17, 36])
def test_crops_share_one_budget_and_do_not_suppress_each_other(k, backend):
    p, expected = decided(lambda seed: prompt(seed, torch.float32, grid=(3, 4), crops=3), lambda p: _expected(p, k))
    kept = _kept(p, k, backend=backend)
    assert kept.details["order"][0].tolist() == expected["order"]


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 20, 40])
def test_padding_changes_nothing(k, dtype, backend):
    """Samples with different grids: the prior is each sample's own."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = adaptprune(
        b.query, b.key, b.features, b.positions, k, grid=b.grid, groups=b.groups, **b.attention, backend=backend
    )
    assert [[i for i in row if i >= 0] for row in kept.details["order"].tolist()] == [e["order"] for e in expected]
    assert_selected(kept, [e["order"] for e in expected])


@over_backends
def test_a_radius_below_one_is_top_k_of_the_corrected_map(backend):
    p, expected = decided(
        lambda seed: prompt(seed, torch.float32),
        lambda p: transcriptions.best(_expected(p, 0)["corrected"], range(30), 9),
    )
    assert _kept(p, 9, radius=0.5, backend=backend).details["order"][0].tolist() == expected


@over_backends
def test_infinite_radius_and_semantic_sigma_leave_the_spatial_gaussian(backend):
    """Every feature counts as alike: the same picks as with equal features."""
    p, expected = decided(
        lambda seed: prompt(seed, torch.float32), lambda p: _expected(p, 9, radius=math.inf, sigma_s=math.inf)
    )
    kept = _kept(p, 9, radius=math.inf, sigma_semantic=math.inf, backend=backend)
    assert kept.details["order"][0].tolist() == expected["order"]
    equal = p._replace(features=torch.ones_like(p.features))
    assert _kept(equal, 9, radius=math.inf, backend=backend).details["order"][0].tolist() == expected["order"]


@over_backends
@pytest.mark.parametrize("options", [{"radius": 2.0}, {"sigma_d": 4.0}, {"sigma_s": 0.4}], ids=str)
def test_options(options, backend):
    names = {"radius": "radius", "sigma_d": "sigma_spatial", "sigma_s": "sigma_semantic"}
    p, expected = decided(lambda seed: prompt(seed, torch.float32), lambda p: _expected(p, 12, **options))
    kept = _kept(p, 12, **{names[n]: v for n, v in options.items()}, backend=backend)
    assert kept.details["order"][0].tolist() == expected["order"]


def test_rejects_bad_arguments():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match="adaptprune: positions must have shape"):
        _kept(p._replace(positions=p.positions[:-1]), 4)
    with pytest.raises(ValueError, match="adaptprune: grid must have shape"):
        _kept(p._replace(grid=torch.tensor([5, 6])), 4)
