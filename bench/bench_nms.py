"""spatial_semantic_nms against the published loop and the reference: AdaptPrune's own setting and larger images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenprune_kernels as tp
from bench.baselines_nms import published_loop
from bench.images import image

Race = Callable[..., dict[str, float]]


def same_picks(results: dict[str, Any]) -> None:
    for name, picks in results.items():
        assert torch.equal(picks, results["ours"]), f"{name} and ours pick different tokens"


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "busy"])
@pytest.mark.parametrize("patch", [1, 4], ids=["distinct", "patches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_crop(race: Race, dtype: torch.dtype, patch: int, busy: bool) -> None:
    """AdaptPrune's own setting: a tenth of the 576 tokens of LLaVA-1.5."""
    scores, features, positions, _ = image("LLaVA-1.5-7B", dtype, patch)
    race(
        f"NMS 576x4096 K57 {str(dtype).removeprefix('torch.')} {'distinct' if patch == 1 else 'patches'}",
        {
            "ours": lambda: tp.spatial_semantic_nms(scores, features, positions, 57)[0][0],
            "published loop": lambda: published_loop(scores[0], features[0], positions[0], 57),
            "reference": lambda: tp.reference.spatial_semantic_nms(scores, features, positions, 57)[0][0],
        },
        check=same_picks,
        target=None if busy else ("published loop", 10.0),
        seconds=1.0,
        busy=busy,
    )


def test_five_crops(race: Race) -> None:
    """A tenth of the 2880 tokens of LLaVA-NeXT. The loop knows no groups: for it the crops lie far apart instead."""
    scores, features, positions, groups = image("LLaVA-NeXT-7B", torch.float32, 4)
    apart = positions + 1000 * groups.unsqueeze(-1)
    race(
        "NMS 5 crops 2880x4096 K288 float32 patches",
        {
            "ours": lambda: tp.spatial_semantic_nms(scores, features, positions, 288, groups=groups)[0][0],
            "published loop": lambda: published_loop(scores[0], features[0], apart[0], 288),
        },
        check=same_picks,
        seconds=1.0,
    )
