"""Timing rows of the greedy ops. A near tie may fall either way between two correct implementations, and every later
pick then differs; so the picks are not compared with another's but replayed: each must be the best one, up to rounding,
given the picks before it, by the objective in float64."""

from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench import baselines_repulsion
from bench.baselines_nms import published_loop
from bench.images import image, make_features
from bench.shapes import Model

from .checks import Function, Inputs
from .device import Device
from .rows import Row, Scale, installed, on

COSINE_TOLERANCE = 2e-5  # of a cosine in float32 from vectors of thousands of components
NEIGHBOURS = 81  # grid cells within radius 5


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


def replay_nms(x: Inputs, picks: Tensor, sigma_spatial: float = 1.5, sigma_semantic: float = 0.05) -> float:
    """Replays soft suppression within radius 5 in float64; the shortfall is relative to the best score."""
    assert_all_different(picks)
    score, unit, coordinates = x["scores"][0].double(), unit_vectors(x["features"][0]), x["positions"][0].double()
    worst = torch.zeros((), dtype=torch.float64, device=score.device)
    for m in picks:
        best = score.amax()
        worst = torch.maximum(worst, (best - score[m]) / best)
        d2 = (coordinates - coordinates[m]).square().sum(-1)
        w = (-d2 / (2 * sigma_spatial**2) - (1 - unit @ unit[m]) ** 2 / (2 * sigma_semantic**2)).exp()
        score = torch.where(d2.sqrt() <= 5, score * (1 - w), score)
        score[m] = -torch.inf
    return float(worst)


def replayed(replay: Any, tolerance: float) -> Any:
    def check(device: Device, x: Inputs, ours: Any) -> dict[str, float]:
        shortfall = replay(x, ours[0][0])
        assert shortfall <= tolerance, f"a pick is {shortfall:.2e} worse than the best candidate, allowed {tolerance}"
        return {"shortfall": shortfall}

    return check


def repulsion_row(device: Device, model: Model, width: int, k: int) -> Row:
    op = device.op("repulsion_sample")

    def make(where: torch.device, seed: int) -> Inputs:
        torch.manual_seed(seed)
        return on(where, {"features": make_features("image", model, width).bfloat16()})

    others: dict[str, Function] = {
        "published loop": lambda x: baselines_repulsion.published(x["features"], k),
        "eager loop": lambda x: baselines_repulsion.incremental(x["features"], k),
        "eager reference": lambda x: tp.reference.repulsion_sample(x["features"], k),
    }
    n = model.tokens
    return Row(
        f"repulsion {n}x{width} K{k} bfloat16",
        ("repulsion_sample",),
        make,
        lambda x: op(x["features"], k),
        replayed(lambda x, picks: replay_max_min(x["features"][0], picks), COSINE_TOLERANCE),
        others,
        uncapturable=("published loop", "eager loop"),  # they read each pick
        bytes=n * width * 2 + 8 * k,
        flops=2.0 * k * n * width,
        dtype=torch.bfloat16,
        steps=k,
        targets={"eager loop": 40.0},
        max_launches=3,  # the Gram matrix, what `first="outlier"` minimises, the picks
        note="the target adds 1 us per step after the Gram product",
    )


def nms_row(device: Device, model: Model, k: int) -> Row:
    op = device.op("spatial_semantic_nms")

    def make(where: torch.device, seed: int) -> Inputs:
        scores, features, positions, _ = image(model, torch.bfloat16, 4, seed)
        return on(where, {"scores": scores, "features": features, "positions": positions})

    others: dict[str, Function] = {
        "published loop": lambda x: published_loop(x["scores"][0], x["features"][0], x["positions"][0], k),
        "eager reference": lambda x: tp.reference.spatial_semantic_nms(**x, k=k),
    }
    if installed("torchvision"):
        from torchvision.ops import nms

        def boxes(x: Inputs) -> Tensor:
            centre = x["positions"][0]
            return nms(torch.cat([centre - 2.5, centre + 2.5], dim=1), x["scores"][0], 0.5)

        others["torchvision.ops.nms on as many boxes"] = boxes
    n = model.tokens
    return Row(
        f"NMS {n}x{model.hidden} K{k} bfloat16",
        ("spatial_semantic_nms",),
        make,
        lambda x: op(**x, k=k),
        replayed(replay_nms, 1e-3),
        others,
        uncapturable=("published loop", "torchvision.ops.nms on as many boxes"),
        bytes=n * model.hidden * 2 + n * 12 + 16 * k,
        flops=2.0 * n * min(NEIGHBOURS, n) * model.hidden,
        dtype=torch.bfloat16,
        steps=k,
        targets={"published loop": 100.0},
        note="torchvision's op does another, simpler thing: boxes instead of features",
    )


def points_row(device: Device, n: int, k: int) -> Row:
    """Farthest-point sampling of 3-D points, which other packages have too."""
    op = device.op("repulsion_sample")
    options: dict[str, Any] = {"potential": "riesz", "feature_weight": 0.0, "first": "index", "epsilon": 1e-12}

    def make(where: torch.device, seed: int) -> Inputs:
        points = torch.rand(1, n, 3, generator=torch.Generator().manual_seed(seed))
        return on(where, {"points": points, "features": torch.ones(1, n, 1)})

    others: dict[str, Function] = {
        "eager reference": lambda x: tp.reference.repulsion_sample(x["features"], k, positions=x["points"], **options)
    }
    if installed("torch_cluster"):
        from torch_cluster import fps

        others["torch_cluster.fps"] = lambda x: fps(x["points"][0], ratio=k / n, random_start=False)
    if installed("pytorch3d"):
        from pytorch3d.ops import sample_farthest_points

        others["pytorch3d.sample_farthest_points"] = lambda x: sample_farthest_points(x["points"], K=k)
    return Row(
        f"farthest points {n}x3 K{k} float32",
        ("repulsion_sample",),
        make,
        lambda x: op(x["features"], k, positions=x["points"], **options),
        replayed(lambda x, picks: replay_points(x["points"][0], picks), 1e-5),
        others,
        uncapturable=("torch_cluster.fps", "pytorch3d.sample_farthest_points"),
        bytes=n * 12 + 8 * k,
        flops=8.0 * n * k,
        steps=k,
    )


def rows(device: Device, scale: Scale) -> list[Row]:
    llava, next_ = scale.model("LLaVA-1.5-7B"), scale.model("LLaVA-NeXT-7B")
    return [
        repulsion_row(device, llava, llava.vision_hidden, scale(64, 8)),
        repulsion_row(device, next_, next_.hidden, scale(320, 12)),
        nms_row(device, llava, scale(57, 6)),
        points_row(device, scale(4096, 60), scale(1024, 12)),
    ]
