"""Vision towers other than CLIP, and decoders with other projections, in the LLaVA families."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.transformers.vlm import models_towers, oracle
from tests.transformers.vlm.checks import IN_MODEL, ON_LAYOUT, RENUMBERED, drops_of
from tests.transformers.vlm.models import Prompts, llava
from tests.transformers.vlm.models_crops import RAGGED
from tests.transformers.vlm.runs_crops import generate, layout_in, pruned, saliency_given, vision_weights
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens


def granite() -> Prompts:
    return models_towers.granite(RAGGED)


over_towers = pytest.mark.parametrize("make", [models_towers.siglip, granite], ids=["siglip", "granite"])


def assert_pruned_logits(prompts: Prompts, method: str, steps: int) -> None:
    """Those of the float64 path with the same tokens dropped, up to twice the unpruned model's own rounding."""
    exact = oracle.in_float64(prompts)
    real = prompts.inputs["attention_mask"].bool()
    with torch.no_grad():
        rounding = (prompts.model(**prompts.inputs).logits - exact.model(**exact.inputs).logits)[real].abs().max()
    with pruned(prompts, method, 9) as pruning:
        new, logits = generate(prompts, steps)
    assert pruning.stats["after"] == [9, 9]
    drops = drops_of(prompts, pruning, 2 if method in IN_MODEL else 0)
    more = {"renumber": method in RENUMBERED}
    expected = oracle.logits(prompts, drops, new[:, :-1], **more)[:, -steps:]
    assert (logits - expected).abs().max() < 2 * rounding < 1e-5  # of logits below 1


# --- without a class token --------------------------------------------------------------------------------------------


@over_towers
@pytest.mark.parametrize("method", METHODS)
def test_towers_without_a_class_token_run_every_method(make: Callable[[], Prompts], method: str) -> None:
    assert_pruned_logits(make(), method, 4)


@pytest.mark.parametrize(("layer", "of_tower"), [(-2, -2), (1, 0), ([-3, -1], -1)])
def test_saliency_in_siglip_is_the_attention_received(
    layer: int | list[int], of_tower: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = models_towers.siglip(layer)
    expected = vision_weights(prompts, "self_attn", of_tower)[0].mean((1, 2))
    assert expected.shape == (2, 25)
    torch.testing.assert_close(saliency_given(prompts, monkeypatch), expected, rtol=1e-4, atol=1e-7)


def test_saliency_in_granite_is_the_attention_received_in_each_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = granite()
    (weights,) = vision_weights(prompts, "self_attn", -1)
    crops = weights.mean((1, 2)).view(-1, 4, 4)
    assert len(crops) == 4 + 5
    # 4 x 12 patches of which columns 2..9 are left, with a newline behind each row.
    wide = torch.cat([crops[1], crops[2], crops[3]], 1)[:, 2:10]
    first = torch.cat([crops[0].flatten(), torch.nn.functional.pad(wide, (0, 1)).flatten()])
    saliency = saliency_given(prompts, monkeypatch)
    torch.testing.assert_close(saliency[0, : len(first)], first, rtol=1e-4, atol=1e-7)


def test_layout_of_siglip() -> None:
    with pruned(prompts := models_towers.siglip(), "random", 3) as pruning:
        generate(prompts, 1)
    layout = layout_in(pruning)
    coordinates = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    assert torch.equal(layout.positions, coordinates.expand(2, -1, -1))
    assert bool((layout.grids == 5).all())


# --- refused, or not by the methods that need none --------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_class_token_among_the_visual_tokens_lies_on_no_grid(method: str) -> None:
    prompts = models_towers.clip_with_its_class_token()
    refused = pytest.raises(NotImplementedError, match="with a class token: the visual tokens are no grid")
    with pruned(prompts, method, 9) as pruning:
        if method in ON_LAYOUT:
            with refused:
                generate(prompts, 1)
            return
        generate(prompts, 1)
    with refused:
        pruning.boxes()
    assert_pruned_logits(prompts, method, 3)


class Mixer(nn.Module):
    """A tower without attention."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.config = tower.config


def test_adafv_refuses_a_tower_whose_attention_it_does_not_find_on_entering() -> None:
    prompts = llava()
    core = prompts.model.model
    core.vision_tower = Mixer(core.vision_tower)
    with pytest.raises(NotImplementedError, match="adafv needs the attention of the vision tower, and Mixer has no"):
        prune_visual_tokens(prompts.model, "adafv", 9).__enter__()
    with prune_visual_tokens(prompts.model, "divprune", 9):
        pass


def test_adaptprune_refuses_fused_projections_on_entering() -> None:
    prompts = models_towers.fused()
    with pytest.raises(NotImplementedError, match="keys before RoPE, and Phi3Attention has no k_proj"):
        prune_visual_tokens(prompts.model, "adaptprune", 9)
    for method in ("coast", "sts", "divprune"):
        assert_pruned_logits(prompts, method, 2)
