"""Which methods the plug-in serves, and that it chooses as they do."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from testing import ROOT
from tokenprune_kernels.integrations.transformers.layout import grid_patches
from tokenprune_kernels.integrations.vllm.choice import OF_IMAGES, Chooser, check_setting, served
from tokenprune_kernels.integrations.vllm.images import prune_images
from tokenprune_kernels.integrations.vllm.setting import Setting
from tokenprune_kernels.methods import (
    Stage,
    cdpruner,
    divprune,
    get_method,
    method_names,
    register_method,
    sts_structure,
    unregister_method,
    visionzip,
)

FEATURES = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
SALIENCY = torch.rand(3, 24, generator=torch.Generator().manual_seed(1))


def pruned(setting: Setting, features: Tensor = FEATURES) -> tuple[Tensor, Tensor]:
    kept = prune_images(
        Chooser(setting), features, lambda: [[grid_patches(4, 6, 0)]] * len(features), lambda: list(SALIENCY)
    )
    return torch.stack([each.indices for each in kept]), torch.stack([each.rows for each in kept])


@pytest.fixture
def norm() -> Iterator[str]:
    """A method of a user's own."""

    def largest_norm(features: Tensor, k: int) -> Tensor:
        return features.norm(dim=-1).topk(k).indices

    register_method("largest_norm", largest_norm, stage="model")
    yield "largest_norm"
    unregister_method("largest_norm")


def test_what_is_served_follows_from_the_descriptions(norm: str) -> None:
    names = set(served())
    assert {"divprune", "random", "visionzip", "scope", "cdpruner", "evs", "vidcom2", "sts_structure", norm} <= names
    assert not {"adafv", "zspaprune", "mmtok", "fastv", "coast", "dart", "sts"} & names
    for name in set(method_names()) - names:
        method = get_method(name)
        assert method.in_model or method.uses - OF_IMAGES


def test_the_page_names_what_is_served() -> None:
    page = (ROOT / "docs" / "vllm.md").read_text()
    assert [name for name in served() if f"`{name}`" not in page] == []


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("adafv", "which asks for text_embeddings, text_mask$"),
        ("fastv", "which asks for .*query"),
        ("sts", "which works inside the language model; its first part is sts_structure$"),
        ("nonsense", "got 'nonsense'$"),
    ],
)
def test_others_are_refused_by_name(method: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^TOKENPRUNE_VLLM: method must choose by the image alone, as .*{why}"):
        check_setting(Setting(method, 4))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="divprune takes no option 'alpha'; its options are first, backend"):
        check_setting(Setting("divprune", 4, options={"alpha": 1}))


def test_it_chooses_as_the_methods_do(norm: str) -> None:
    grid = grid_patches(4, 6, 0).positions.expand(3, -1, -1)
    stacked = torch.nn.functional.pad(grid, (0, 1))
    expected = {
        "divprune": divprune(FEATURES, 7).indices,
        "sts_structure": sts_structure(FEATURES, 7, positions=stacked).indices,
        "cdpruner": cdpruner(FEATURES, FEATURES[:, :0], 7).indices,
        norm: FEATURES.norm(dim=-1).topk(7).indices.sort(-1).values,
    }
    for method, indices in expected.items():
        chosen, rows = pruned(Setting(method, 7))
        assert torch.equal(chosen, indices), method
        assert torch.equal(rows, FEATURES.gather(1, indices.unsqueeze(-1).expand(-1, -1, 8))), method


def test_rows_that_are_merged_take_the_places_of_the_kept() -> None:
    chosen, rows = pruned(Setting("visionzip", 8))
    expected = visionzip(FEATURES, SALIENCY, 8)
    assert torch.equal(chosen, expected.indices)
    assert expected.merged is not None
    assert torch.equal(rows, expected.merged)
    assert not torch.equal(rows, FEATURES.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 8)))


def test_an_image_is_chosen_from_as_if_it_were_alone() -> None:
    """What is kept of it is shared among requests, whatever else was encoded with it."""
    for setting in (Setting("random", 6, seed=3), Setting("divprune", 0.25), Setting("scope", 5)):
        together = pruned(setting)[0]
        assert torch.equal(together[:1], pruned(setting, FEATURES[:1])[0]), setting
    drawn = pruned(Setting("random", 6, seed=3), FEATURES[:1].repeat(3, 1, 1))[0]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], pruned(Setting("random", 6, seed=4))[0][0])


@pytest.mark.parametrize("keep", [24, 100, 1.0])
def test_a_budget_that_covers_all_tokens_leaves_them(keep: int | float) -> None:
    chosen, rows = pruned(Setting("visionzip", keep))
    assert torch.equal(chosen, torch.arange(24).expand(3, -1))
    assert rows.shape == FEATURES.shape
    assert torch.equal(rows, FEATURES)


def test_what_is_optional_is_one_of_the_known_arguments() -> None:
    with pytest.raises(ValueError, match=r"method divprune: optional must be of query, .* got 'nonsense'"):
        Stage(divprune, "model", optional=("nonsense",))
