"""Rows of dpp_sample and coverage_sample on a GPU. Picks are replayed in float64, as those of repulsion_sample: a near
tie may fall either way, and every later pick then differs."""

import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench import baselines_greedy as baselines
from bench.shapes import Model
from testing.gpu_checks import Inputs
from tokenprune_kernels.quick.images import make_features

from . import Row, Scale, on
from .repulsion import assert_all_different, replayed, unit_vectors

GAIN_TOLERANCE = 1e-4  # of a residual in float32 behind hundreds of subtractions; the largest is 1


def replay_dpp(features: Tensor, quality: Tensor, picks: Tensor) -> float:
    """By how much the worst pick falls short of the largest gain, with the factor in float64."""
    assert_all_different(picks)
    rows = quality.double()[:, None] * unit_vectors(features)
    factor, gain, worst = rows.new_zeros(len(picks), len(rows)), rows.square().sum(1), 0.0
    for step, j in enumerate(picks.tolist()):
        worst = max(worst, float(gain.max() - gain[j]))
        factor[step] = (rows @ rows[j] - factor[:step, j] @ factor[:step]) / gain[j].sqrt()
        gain -= factor[step].square()
        gain[j] = -torch.inf
    return worst


def replay_coverage(similarity: Tensor, quality: Tensor, picks: Tensor) -> float:
    """The same of the gains of facility location, as a part of the first gain."""
    assert_all_different(picks)
    covers, q = similarity.double().clamp_min(0), quality.double()
    covered, taken = covers.new_zeros(len(covers), 1), torch.zeros_like(q, dtype=torch.bool)
    first, worst = float((q * covers.sum(0)).max()), 0.0
    for j in picks.tolist():
        gain = (q * (covers - covered).clamp_min(0).sum(0)).masked_fill(taken, -torch.inf)
        worst = max(worst, float(gain.max() - gain[j]))
        covered, taken[j] = torch.maximum(covered, covers[:, j, None]), True
    return worst / first


def dpp_row(model: Model, width: int, k: int) -> Row:
    n = model.tokens

    def make(device: torch.device, seed: int) -> Inputs:
        torch.manual_seed(seed)
        features = make_features("image", model, width).to(torch.bfloat16)
        return on(device, {"features": features, "quality": torch.rand(1, n) + 1e-3})

    return Row(
        f"DPP {n}x{width} K{k} bfloat16",
        ("dpp_sample",),
        make,
        lambda x: tp.dpp_sample(x["features"], k, quality=x["quality"]),
        replayed(lambda x, picks: replay_dpp(x["features"][0], x["quality"][0], picks), GAIN_TOLERANCE),
        {
            "published loop": lambda x: baselines.dpp(x["features"], x["quality"], k),
            "reference": lambda x: tp.reference.dpp_sample(x["features"], k, quality=x["quality"]),
        },
        bytes=n * width * 2 + 8 * k,
        flops=2.0 * k * n * width,
        dtype=torch.bfloat16,
        steps=k,
        max_launches=2,
    )


def coverage_row(model: Model, k: int) -> Row:
    n = model.tokens

    def make(device: torch.device, seed: int) -> Inputs:
        torch.manual_seed(seed)
        unit = torch.nn.functional.normalize(make_features("image", model, model.vision_hidden), dim=-1)
        return on(device, {"similarity": unit @ unit.mT, "quality": torch.rand(1, n)})

    return Row(
        f"coverage {n}x{n} K{k} float32",
        ("coverage_sample",),
        make,
        lambda x: tp.coverage_sample(x["similarity"], k, quality=x["quality"]),
        replayed(lambda x, picks: replay_coverage(x["similarity"][0], x["quality"][0], picks), 1e-5),
        {
            "published loop": lambda x: baselines.coverage(x["similarity"], x["quality"], k),
            "reference": lambda x: tp.reference.coverage_sample(x["similarity"], k, quality=x["quality"]),
        },
        bytes=4.0 * n * n + 8 * k,
        flops=3.0 * n * n,
        steps=k,
        max_launches=2,
    )


def gpu_rows(scale: Scale) -> list[Row]:
    llava, next_ = scale.model("LLaVA-1.5-7B"), scale.model("LLaVA-NeXT-7B")
    return [
        dpp_row(llava, llava.vision_hidden, scale(128, 8)),
        dpp_row(next_, next_.hidden, scale(320, 12)),
        coverage_row(llava, scale(128, 8)),
        coverage_row(next_, scale(320, 12)),
    ]
