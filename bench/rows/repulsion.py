"""Rows of repulsion_sample. A near tie may fall either way between two correct implementations, and every later pick
then differs; so on a GPU the picks are not compared with another's but replayed: each must be the best one, up to
rounding, given the picks before it, by the objective in float64."""

from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench import baselines_repulsion as baselines
from bench.shapes import MODELS, Model
from testing.gpu_checks import Function, Inputs
from tokenprune_kernels.quick.images import grid_positions, make_features

from . import Check, Make, Row, Scale, on, same

COSINE_TOLERANCE = 2e-5  # of a cosine in float32 from vectors of thousands of components


def unit_vectors(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=-1)


def assert_all_different(picks: Tensor) -> None:
    kept = picks.tolist()
    assert len(set(kept)) == len(kept), "a token was picked twice"
    assert min(kept) >= 0, "there is padding among the picks"


def shortfall_of_steps(objective: Tensor, picks: Tensor) -> float:
    """How much worse than the best a pick is at most; step s minimises objective[s] over the tokens left."""
    steps, tokens = objective.shape
    taken = torch.nn.functional.one_hot(picks, tokens).cumsum(0)
    taken = torch.cat([torch.zeros_like(taken[:1]), taken[:-1]])[:steps].bool()
    best = objective.masked_fill(taken, torch.inf).amin(1)
    return float((objective.gather(1, picks[:steps, None]).squeeze(1) - best).max())


def replay_max_min(features: Tensor, picks: Tensor) -> float:
    """Replays max-min sampling by cosine from the outlier in float64: the shortfall of the worst pick."""
    assert_all_different(picks)
    unit = unit_vectors(features)
    first = unit @ torch.nn.functional.normalize(unit.sum(0), dim=0)
    running = (unit[picks[:-1]] @ unit.T).cummax(0).values
    return shortfall_of_steps(torch.cat([first[None], running]), picks)


def replay_points(points: Tensor, picks: Tensor) -> float:
    """Replays farthest-point sampling from token 0 in float64."""
    assert_all_different(picks)
    assert picks[0] == 0, "sampling must start from the lowest index"
    nearest = torch.cdist(points[picks[:-1]].double(), points.double()).cummin(0).values
    start = torch.arange(len(points), device=points.device, dtype=torch.float64)
    return shortfall_of_steps(torch.cat([start[None], -nearest]), picks)


def replayed(replay: Any, tolerance: float) -> Check:
    def check(x: Inputs, ours: Any) -> dict[str, float]:
        shortfall = replay(x, ours[0][0])
        assert shortfall <= tolerance, f"a pick is {shortfall:.2e} worse than the best candidate, allowed {tolerance}"
        return {"shortfall": shortfall}

    return check


# --- on a GPU --------------------------------------------------------------------------------------------------------


def features(kind: str, model: Model, width: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> Make:
    def make(device: torch.device, seed: int) -> Inputs:
        torch.manual_seed(seed)
        drawn = torch.cat([make_features(kind, model, width) for _ in range(batch)])
        return on(device, {"features": drawn.to(dtype), "positions": grid_positions(model)})

    return make


def repulsion_row(model: Model, width: int, k: int) -> Row:
    n = model.tokens
    return Row(
        f"repulsion {n}x{width} K{k} bfloat16",
        ("repulsion_sample",),
        features("image", model, width, torch.bfloat16),
        lambda x: tp.repulsion_sample(x["features"], k),
        replayed(lambda x, picks: replay_max_min(x["features"][0], picks), COSINE_TOLERANCE),
        {
            "published loop": lambda x: baselines.published(x["features"], k),
            "incremental loop": lambda x: baselines.incremental(x["features"], k),
            "reference": lambda x: tp.reference.repulsion_sample(x["features"], k),
        },
        uncapturable=("published loop", "incremental loop"),  # they read each pick
        bytes=n * width * 2 + 8 * k,
        flops=2.0 * k * n * width,
        dtype=torch.bfloat16,
        steps=k,
        targets={"incremental loop": 40.0},
        max_launches=3,  # the Gram matrix, what `first="outlier"` minimises, the picks
        note="the target adds 1 us per step after the Gram product",
    )


def points_row(n: int, k: int) -> Row:
    """Farthest-point sampling of 3-D points, which other packages have too (peers.py)."""
    options: dict[str, Any] = {"potential": "riesz", "feature_weight": 0.0, "first": "index", "epsilon": 1e-12}

    def make(device: torch.device, seed: int) -> Inputs:
        points = torch.rand(1, n, 3, generator=torch.Generator().manual_seed(seed))
        return on(device, {"points": points, "features": torch.ones(1, n, 1)})

    def run(module: Any, x: Inputs) -> Any:
        return module.repulsion_sample(x["features"], k, positions=x["points"], **options)

    return Row(
        f"farthest points {n}x3 K{k} float32",
        ("repulsion_sample",),
        make,
        lambda x: run(tp, x),
        replayed(lambda x, picks: replay_points(x["points"][0], picks), 1e-5),
        {"reference": lambda x: run(tp.reference, x)},
        bytes=n * 12 + 8 * k,
        flops=8.0 * n * k,
        steps=k,
    )


def gpu_rows(scale: Scale) -> list[Row]:
    llava, next_ = scale.model("LLaVA-1.5-7B"), scale.model("LLaVA-NeXT-7B")
    return [
        repulsion_row(llava, llava.vision_hidden, scale(64, 8)),
        repulsion_row(next_, next_.hidden, scale(320, 12)),
        points_row(scale(4096, 60), scale(1024, 12)),
    ]


# --- on a CPU --------------------------------------------------------------------------------------------------------
# Two kinds of features. `image`: what neighbouring visual tokens look like, a smooth random field over the grid of each
# crop plus a common direction plus noise. `gaussian`: independent tokens, where no two are alike.


def cpu_rows() -> list[Row]:
    cases = [(MODELS["LLaVA-1.5-7B"], 1024), (MODELS["LLaVA-NeXT-7B"], 4096)]
    energy: dict[str, Any] = {"potential": "riesz", "aggregate": "sum"}

    def row(case: str, make: Make, f: Function, others: dict[str, Function], **more: Any) -> Row:
        return Row(case, (), make, f, None, others, agree=same, **{"seconds": 1.5, **more})

    def max_min(model: Model, width: int, kind: str, busy: bool) -> Row:
        k = model.keep
        others: dict[str, Function] = {
            "incremental loop": lambda x: baselines.incremental(x["features"], k),
            "published loop": lambda x: baselines.published(x["features"], k),
        }
        if model.tokens < 1000:  # beyond, the r2 and phi matrices of a general potential take tens of times longer
            others["reference"] = lambda x: tp.reference.repulsion_sample(x["features"], k)[0]
        return row(
            f"max-min, {model.name}, {kind}, {model.tokens}x{width} -> {k}", features(kind, model, width),
            lambda x: tp.repulsion_sample(x["features"], k)[0], others, busy=busy,
            targets={} if busy else {"published loop": 2.5 if model.tokens < 1000 else 3.0},
        )  # fmt: skip

    def isolated(model: Model, width: int, kind: str, busy: bool) -> Row:
        """DivPrune's start needs every token's nearest neighbour."""
        return row(
            f"max-min from the most isolated, {model.name}, {kind}", features(kind, model, width),
            lambda x: tp.repulsion_sample(x["features"], model.keep, first="isolated")[0],
            {"incremental loop": lambda x: baselines.incremental(x["features"], model.keep, isolated=True)}, busy=busy,
        )  # fmt: skip

    def riesz(model: Model, width: int, kind: str, busy: bool) -> Row:
        return row(
            f"riesz sum, {model.name}, {kind}, {model.tokens}x{width} -> {model.keep}", features(kind, model, width),
            lambda x: tp.repulsion_sample(x["features"], model.keep, positions=x["positions"], **energy)[0],
            {"incremental loop": lambda x: baselines.energy_minimisation(x["features"], x["positions"], model.keep)},
            busy=busy,
        )  # fmt: skip

    def batch(model: Model, width: int) -> Row:
        def loop(x: Inputs) -> Tensor:
            return torch.stack([baselines.incremental(f[None], model.keep) for f in x["features"]])

        return row(f"max-min, {model.name}, bfloat16, batch of 8", features("image", model, width, torch.bfloat16, 8),
                   lambda x: tp.repulsion_sample(x["features"], model.keep)[0], {"incremental loop": loop},
                   seconds=1.0)  # fmt: skip

    return [
        *(
            make(model, width, kind, busy)
            for make in (max_min, isolated, riesz)
            for model, width in cases
            for kind in ("image", "gaussian")
            for busy in (False, True)
        ),
        batch(*cases[0]),
    ]
