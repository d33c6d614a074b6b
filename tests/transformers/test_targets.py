"""Budgets in FLOPs and milliseconds: the formula against a literal count, and what stays within it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.transformers.vlm import runs_crops, runs_qwen
from tests.transformers.vlm.checks import LAYER
from tests.transformers.vlm.models import TEXT, Prompts, llava
from tests.transformers.vlm.models_towers import fused
from tokenprune_kernels.integrations.transformers import Flops, Milliseconds, decoder_flops, prune_visual_tokens
from tokenprune_kernels.integrations.transformers.registry import family_of
from tokenprune_kernels.integrations.transformers.targets import flops_of

DEPTH, VISUAL = TEXT["num_hidden_layers"], 36
FAMILIES: dict[str, Any] = {
    "llava": lambda: llava(1),
    "fused projections": fused,
    **{name: lambda name=name: runs_crops.prompts_of(name, "single") for name in runs_crops.FAMILIES},
    **{name: lambda name=name: runs_qwen.batch(name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}


@contextmanager
def eager(prompts: Prompts) -> Iterator[None]:
    """Attention as two products, which the counter sees on every device."""
    before = prompts.model.config._attn_implementation
    prompts.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        prompts.model.set_attn_implementation(before)


def counted(prompts: Prompts) -> int:
    """FLOPs of all decoder layers in one forward."""
    with eager(prompts), torch.no_grad(), FlopCounterMode(display=False) as counter:
        prompts.model(**prompts.inputs)
    by_module = counter.get_flop_counts()
    layers = [name for name in by_module if ".language_model." in name and name.rpartition(".")[0].endswith("layers")]
    assert len(layers) == DEPTH
    return sum(sum(by_module[name].values()) for name in layers)


def size(prompts: Prompts) -> tuple[int, int]:
    """Samples, and tokens of the padded prompt."""
    batch, length = prompts.inputs["input_ids"].shape
    return batch, length


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_are_counted(family: str) -> None:
    prompts = FAMILIES[family]()
    batch, length = size(prompts)
    assert counted(prompts) == batch * decoder_flops(prompts.model, length)


@pytest.mark.parametrize(
    ("method", "options"), [("divprune", {}), ("fastv", {"layer": LAYER}), ("fastv", {"layer": 1})]
)
@pytest.mark.parametrize("share", [0.9, 0.65])
def test_a_pruned_prefill_is_within_its_share_and_one_token_more_is_not(
    method: str, options: dict[str, int], share: float
) -> None:
    prompts = llava(1)
    whole = counted(prompts)
    with prune_visual_tokens(prompts.model, method, Flops(share), **options) as pruning:
        assert counted(prompts) <= share * whole
    (after,) = pruning.stats["after"]
    assert 1 < after < VISUAL
    with prune_visual_tokens(prompts.model, method, after + 1, **options):
        assert counted(prompts) > share * whole


def closed_form(linear: float, square: float, share: float, layer: int, visual: int, text: int) -> int:
    """The formula of docs/transformers.md."""
    whole = linear * (text + visual) + square * (text + visual) ** 2
    c = (share * DEPTH - layer) / (DEPTH - layer) * whole
    return math.floor((math.sqrt(linear**2 + 4 * square * c) - linear) / (2 * square)) - text


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("visual", [VISUAL, 576, 2880])
def test_the_budget_is_that_of_the_formula_solved(layer: int, visual: int) -> None:
    model = llava(1).model
    cost = flops_of(family_of(model).decoder(model.model))
    for share in (0.65, 0.86, 0.999):
        method, options = ("divprune", {}) if layer == 0 else ("fastv", {"layer": layer})
        pruning = prune_visual_tokens(model, method, Flops(share), **options)
        expected = closed_form(cost.linear[0], cost.square[0], share, layer, visual, text=12)
        assert pruning.budget(visual, 12) == {layer: expected}


def test_stages_and_schedules_are_counted_as_they_are() -> None:
    """sts has twice its budget between its two prunings; pyramiddrop comes to its last number in proportion."""
    model = llava(1).model
    cost = flops_of(family_of(model).decoder(model.model))

    def total(lengths: list[int]) -> float:
        return cost.of([12 + n for n in lengths])

    limit = 0.6 * total([576] * 4)
    budget = prune_visual_tokens(model, "sts", Flops(0.6), layer=LAYER).budget(576, 12)
    k = budget[LAYER]
    assert budget == {0: 2 * k, LAYER: k}
    assert total([2 * k] * 2 + [k] * 2) <= limit < total([2 * k + 2] * 2 + [k + 1] * 2)
    budget = prune_visual_tokens(model, "pyramiddrop", Flops(0.6)).budget(576, 12)
    k = budget[3]
    assert budget == {1: 4 * k, 2: 2 * k, 3: k}
    assert total([576, 4 * k, 2 * k, k]) <= limit < total([576, 4 * k + 4, 2 * k + 2, k + 1])


def test_every_sample_has_the_budget_of_its_own_prompt() -> None:
    prompts = llava(2, ragged=True)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "fastv", Flops(0.8), layer=1) as pruning:
        prompts.model(**prompts.inputs)
    text = [int(row.sum()) - VISUAL for row in prompts.inputs["attention_mask"]]
    assert text[0] < text[1]
    assert pruning.stats["after"] == [pruning.budget(VISUAL, n)[1] for n in text]


def test_the_least_is_kept_whatever_it_costs() -> None:
    model = llava(1).model
    assert prune_visual_tokens(model, "divprune", Flops(0.01), min_keep=8).budget(VISUAL, 12) == {0: 8}
    assert prune_visual_tokens(model, "divprune", Flops(0.9), min_keep=8).budget(VISUAL, 12)[0] > 8
    assert prune_visual_tokens(model, "divprune", Flops(0.01), min_keep=99).budget(VISUAL, 12) == {0: VISUAL}
    with pytest.raises(ValueError, match=r"Flops\(share=0.01\) cannot be reached: .* 36 visual tokens and 12 others"):
        prune_visual_tokens(model, "divprune", Flops(0.01)).budget(VISUAL, 12)
    with pytest.raises(ValueError, match="prune in front of an earlier layer"):
        prune_visual_tokens(model, "fastv", Flops(0.5), layer=3).budget(VISUAL, 12)


def test_the_whole_is_the_whole() -> None:
    prompts = llava(1)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "fastv", Flops(1.0)) as pruning:
        prompts.model(**prompts.inputs)
    assert pruning.stats["layers"] == []


# --- milliseconds -----------------------------------------------------------------------------------------------------


def test_milliseconds_solve_the_two_measured_points() -> None:
    """Of a machine that takes L / 10 + L ** 2 / 10000 ms for L tokens."""
    model = llava(1).model

    def takes(tokens: float) -> float:
        return tokens / 10 + tokens**2 / 10000

    measured = [(600, takes(600)), (100, takes(100))]
    assert Milliseconds(50, measured).costs() == pytest.approx((0.1, 1e-4))
    assert prune_visual_tokens(model, "divprune", Milliseconds(takes(312.5), measured)).budget(576, 12) == {0: 300}
    half = (takes(588) + takes(312.5)) / 2  # two of four layers see the whole prompt
    assert prune_visual_tokens(model, "fastv", Milliseconds(half, measured), layer=2).budget(576, 12) == {2: 300}
    assert prune_visual_tokens(model, "divprune", Milliseconds(9e9, measured)).budget(576, 12) == {0: 576}


def test_lengths_that_were_not_measured_are_refused() -> None:
    model = llava(1).model
    pruning = prune_visual_tokens(model, "divprune", Milliseconds(20, [(100, 11.0), (600, 96.0)]))
    assert 100 <= 12 + pruning.budget(576, 12)[0] < 200
    with pytest.raises(ValueError, match="prompts of 100 and 600 tokens, and this one has 601"):
        pruning.budget(576, 25)
    with pytest.raises(ValueError, match=r"this one has 588, \d\d behind the pruning"):
        prune_visual_tokens(model, "divprune", Milliseconds(10, [(100, 11.0), (600, 96.0)])).budget(576, 12)


# --- what is refused --------------------------------------------------------------------------------------------------

POINTS = [(100, 11.0), (600, 96.0)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Flops(0), ValueError, r"share must lie in \(0, 1\], got 0"),
        (lambda: Flops(1.5), ValueError, "got 1.5"),
        (lambda: Flops("half"), TypeError, "share must be a number, got 'half'"),
        (lambda: Flops(True), TypeError, "got True"),
        (lambda: Milliseconds(0, POINTS), ValueError, "limit must be positive"),
        (lambda: Milliseconds(5, POINTS[:1]), ValueError, "two pairs"),
        (lambda: Milliseconds(5, [(100, 11.0, 1), (600, 96.0)]), ValueError, "two pairs"),
        (lambda: Milliseconds(5, [(100, 11.0), (100, 12.0)]), ValueError, "must have taken longer"),
        (lambda: Milliseconds(5, [(100, 11.0), (600, 10.0)]), ValueError, "must have taken longer"),
        (lambda: Milliseconds(5, [(100, 11.0), (600, 60.0)]), ValueError, "do not fit"),
        (lambda: Milliseconds(5, [(100, 1.0), (600, 96.0)]), ValueError, "do not fit"),
        (lambda: Milliseconds(5, [("100", 1.0), (600, 96.0)]), TypeError, "must be a number"),
    ],
)
def test_a_wrong_target_is_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"keep": Flops(0.5), "per": "image"},
            NotImplementedError,
            r"Flops\(share=0.5\) is what a whole prompt may cost",
        ),
        ({"keep": {1: Flops(0.5)}}, TypeError, r"got Flops\(share=0.5\)"),
        ({"keep": [Flops(0.5), 3], "per": "sample"}, TypeError, "keep must be an int"),
        ({"keep": Flops(0.5), "method": "divprune", "layer": 1}, ValueError, "takes no layer"),
        ({"keep": Flops(0.5), "min_keep": 0}, ValueError, "min_keep must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused_on_entering(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        prune_visual_tokens(llava().model, **{"method": "fastv", **arguments})


def test_layers_whose_flops_are_not_known_are_refused_by_name() -> None:
    model = llava().model
    layer = model.model.language_model.layers[1]
    layer.mlp.experts = torch.nn.Conv1d(4, 4, 1)
    with pytest.raises(NotImplementedError, match="what Conv1d does with its weight is not known"):
        prune_visual_tokens(model, "fastv", Flops(0.5))
    del layer.mlp.experts
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(NotImplementedError, match=r"known for full attention only, .* layers of sliding_attention"):
        prune_visual_tokens(model, "fastv", Flops(0.5))
