"""Rows of spatial_semantic_nms: AdaptPrune's own setting and larger images, against the published loop."""

from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from bench.shapes import MODELS, Model
from testing.gpu_checks import Function, Inputs
from tokenprune_kernels.quick.images import image
from tokenprune_kernels.quick.loops import nms as published_loop

from . import Make, Row, Scale, on, same, short
from .repulsion import assert_all_different, replayed, unit_vectors

NEIGHBOURS = 81  # grid cells within radius 5


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


def image_inputs(model: Model, dtype: torch.dtype, patch: int) -> Make:
    def make(device: torch.device, seed: int) -> Inputs:
        scores, features, positions, groups = image(model, dtype, patch, seed)
        return on(device, {"scores": scores, "features": features, "positions": positions, "groups": groups})

    return make


def picks_of(module: Any, x: Inputs, k: int, **more: Any) -> Any:
    return module.spatial_semantic_nms(x["scores"], x["features"], x["positions"], k, **more)


def loop(x: Inputs, k: int) -> Tensor:
    return published_loop(x["scores"][0], x["features"][0], x["positions"][0], k)


def gpu_rows(scale: Scale) -> list[Row]:
    model, k = scale.model("LLaVA-1.5-7B"), scale(57, 6)
    n = model.tokens
    others: dict[str, Function] = {
        "published loop": lambda x: loop(x, k),
        "reference": lambda x: picks_of(tp.reference, x, k),
    }
    return [
        Row(
            f"NMS {n}x{model.hidden} K{k} bfloat16",
            ("spatial_semantic_nms",),
            image_inputs(model, torch.bfloat16, 4),
            lambda x: picks_of(tp, x, k),
            replayed(replay_nms, 1e-3),
            others,
            uncapturable=("published loop",),
            bytes=n * model.hidden * 2 + n * 12 + 16 * k,
            flops=2.0 * n * min(NEIGHBOURS, n) * model.hidden,
            dtype=torch.bfloat16,
            steps=k,
            targets={"published loop": 100.0},
        )
    ]


def cpu_rows() -> list[Row]:
    llava, crops = MODELS["LLaVA-1.5-7B"], MODELS["LLaVA-NeXT-7B"]

    def one_crop(dtype: torch.dtype, patch: int, busy: bool) -> Row:
        """AdaptPrune's own setting: a tenth of the 576 tokens of LLaVA-1.5."""
        others: dict[str, Function] = {
            "published loop": lambda x: loop(x, 57),
            "reference": lambda x: picks_of(tp.reference, x, 57)[0],
        }
        return Row(f"NMS 576x4096 K57 {short(dtype)} {'distinct' if patch == 1 else 'patches'}", (),
                   image_inputs(llava, dtype, patch), lambda x: picks_of(tp, x, 57)[0], None, others, agree=same,
                   targets={} if busy else {"published loop": 10.0}, busy=busy)  # fmt: skip

    def apart(x: Inputs) -> Tensor:
        """The loop knows no groups: for it the crops lie far apart instead."""
        return loop({**x, "positions": x["positions"] + 1000 * x["groups"].unsqueeze(-1)}, 288)

    five = Row("NMS 5 crops 2880x4096 K288 float32 patches", (), image_inputs(crops, torch.float32, 4),
               lambda x: picks_of(tp, x, 288, groups=x["groups"])[0], None, {"published loop": apart},
               agree=same)  # fmt: skip
    dtypes, patches = (torch.float32, torch.bfloat16), (1, 4)
    return [*(one_crop(d, p, busy) for d in dtypes for p in patches for busy in (False, True)), five]
