"""repulsion_sample on the sizes of LLaVA-1.5 and LLaVA-NeXT against eager loops over a Gram matrix.

Two kinds of features. `image`: what neighbouring visual tokens look like, a smooth random field over the grid of each
crop plus a common direction plus noise. `gaussian`: independent tokens, where no two are alike.
"""

from typing import Any

import pytest
import torch

import tokenprune_kernels as tp

from . import baselines_repulsion as baselines
from .images import grid_positions, make_features
from .shapes import MODELS

beside = pytest.mark.parametrize("busy", [False, True], ids=["quiet", "busy"])
over_kinds = pytest.mark.parametrize("kind", ["image", "gaussian"])
CASES = {name: (MODELS[name], width) for name, width in (("LLaVA-1.5-7B", 1024), ("LLaVA-NeXT-7B", 4096))}
over_models = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def same_picks(results: dict[str, Any]) -> None:
    for name, picks in results.items():
        assert torch.equal(picks.flatten(), results["ours"].flatten()), name


@beside
@over_kinds
@over_models
def test_max_min(race: Any, case: Any, kind: str, busy: bool) -> None:
    model, width = case
    features = make_features(kind, model, width)
    functions = {
        "ours": lambda: tp.repulsion_sample(features, model.keep)[0],
        "incremental loop": lambda: baselines.incremental(features, model.keep),
        "published loop": lambda: baselines.published(features, model.keep),
        "reference": lambda: tp.reference.repulsion_sample(features, model.keep)[0],
    }
    if model.tokens > 1000:
        del functions["reference"]  # the r2 and phi matrices of a general potential: tens of times slower
    race(
        f"max-min, {model.name}, {kind}, {model.tokens}x{width} -> {model.keep}",
        functions,
        check=same_picks,
        target=None if busy else ("published loop", 2.5 if model.tokens < 1000 else 3.0),
        seconds=1.5,
        busy=busy,
    )


@beside
@over_kinds
@over_models
def test_max_min_from_the_most_isolated(race: Any, case: Any, kind: str, busy: bool) -> None:
    """DivPrune's start needs every token's nearest neighbour."""
    model, width = case
    features = make_features(kind, model, width)
    race(
        f"max-min from the most isolated, {model.name}, {kind}",
        {
            "ours": lambda: tp.repulsion_sample(features, model.keep, first="isolated")[0],
            "incremental loop": lambda: baselines.incremental(features, model.keep, isolated=True),
        },
        check=same_picks,
        seconds=1.5,
        busy=busy,
    )


@beside
@over_kinds
@over_models
def test_energy_minimisation(race: Any, case: Any, kind: str, busy: bool) -> None:
    model, width = case
    features, positions = make_features(kind, model, width), grid_positions(model)
    options = {"positions": positions, "potential": "riesz", "aggregate": "sum"}
    race(
        f"riesz sum, {model.name}, {kind}, {model.tokens}x{width} -> {model.keep}",
        {
            "ours": lambda: tp.repulsion_sample(features, model.keep, **options)[0],
            "incremental loop": lambda: baselines.energy_minimisation(features, positions, model.keep),
        },
        check=same_picks,
        seconds=1.5,
        busy=busy,
    )


def test_half_precision_batch(race: Any) -> None:
    model, width = CASES["LLaVA-1.5-7B"]
    features = torch.cat([make_features("image", model, width) for _ in range(8)]).bfloat16()
    race(
        f"max-min, {model.name}, bfloat16, batch of 8",
        {
            "ours": lambda: tp.repulsion_sample(features, model.keep)[0],
            "incremental loop": lambda: torch.stack([baselines.incremental(f[None], model.keep) for f in features]),
        },
        check=same_picks,
        seconds=1.0,
    )
