"""dpp_sample on the sizes of LLaVA-1.5 and LLaVA-NeXT against the loop of CDPruner, restated from its formulas.

`image`: neighbouring tokens are alike, which is what diversity is about; `gaussian`: no two are. The quality of a token
is its relevance scaled to [0, 1], as CDPruner makes it; without one (`plain`) it is 1, and gains differ little.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from tokenprune_kernels.quick.images import make_features

from .baselines_greedy import dpp as published
from .shapes import MODELS

over_kinds = pytest.mark.parametrize("kind", ["image", "gaussian"])
CASES = {name: (MODELS[name], width) for name, width in (("LLaVA-1.5-7B", 1024), ("LLaVA-NeXT-7B", 4096))}
over_models = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def greedy_up_to_rounding(features: Tensor, quality: Tensor) -> Callable[[dict[str, Tensor]], None]:
    """Whether every pick has, in float64, the largest gain given the earlier ones: roundings may swap near ties."""
    rows = quality[0].double().unsqueeze(1) * torch.nn.functional.normalize(features[0].double(), dim=-1)

    def check(results: dict[str, Tensor]) -> None:
        for name, picks in results.items():
            factor, gain = rows.new_zeros(picks.shape[1], len(rows)), rows.square().sum(1)
            for step, j in enumerate(picks[0].tolist()):
                assert gain[j] >= gain.max() - 1e-5, f"{name}: pick {step}"
                factor[step] = (rows @ rows[j] - factor[:step, j] @ factor[:step]) / gain[j].sqrt()
                gain -= factor[step].square()
                gain[j] = -torch.inf

    return check


@over_kinds
@over_models
def test_with_relevance(race: Any, case: Any, kind: str) -> None:
    model, width = case
    features, quality = make_features(kind, model, width), torch.rand(1, model.tokens) + 1e-3
    race(
        f"DPP with relevance, {model.name}, {kind}, {model.tokens}x{width} -> {model.keep}",
        {
            "ours": lambda: tp.dpp_sample(features, model.keep, quality=quality)[0],
            "published loop": lambda: published(features, quality, model.keep),
        },
        check=greedy_up_to_rounding(features, quality),
        target=("published loop", 20.0 if model.tokens < 1000 else 3.0),
        seconds=1.5,
    )


@over_kinds
@over_models
def test_plain(race: Any, case: Any, kind: str) -> None:
    """All gains start at 1: the first pick is a matter of rounding, and the others follow from it."""
    model, width = case
    features = make_features(kind, model, width)
    ones = torch.ones(1, model.tokens)
    race(
        f"DPP, {model.name}, {kind}, {model.tokens}x{width} -> {model.keep}",
        {
            "ours": lambda: tp.dpp_sample(features, model.keep)[0],
            "published loop": lambda: published(features, ones, model.keep),
        },
        check=greedy_up_to_rounding(features, ones),
        seconds=1.5,
    )


@over_models
def test_factor_alone(race: Any, case: Any) -> None:
    """Features of as many channels as picks: the kernel costs next to nothing, and the loop is what is measured."""
    model, _ = case
    features, quality = make_features("gaussian", model, model.keep), torch.rand(1, model.tokens) + 1e-3
    race(
        f"DPP with relevance, {model.name}, gaussian, {model.tokens}x{model.keep} -> {model.keep}",
        {
            "ours": lambda: tp.dpp_sample(features, model.keep, quality=quality)[0],
            "published loop": lambda: published(features, quality, model.keep),
        },
        check=greedy_up_to_rounding(features, quality),
        seconds=1.5,
    )
