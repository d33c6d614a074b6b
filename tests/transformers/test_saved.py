"""What a block tells of its choice afterwards: scores of every token, orders, and images of what was kept."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.transformers.vlm.checks import options_of
from tests.transformers.vlm.models import Prompts, llava
from tests.transformers.vlm.runs_crops import prompts_of
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens
from tokenprune_kernels.integrations.transformers.overlay import GAP
from tokenprune_kernels.methods import Selection

VISUAL = 36
# Of every method the names under which its function tells a number for each token, by the layers of LLaVA's toy.
TOLD = {
    "coast": {2: {"global", "last", "contrast"}},
    "sts": {0: {"rank"}, 2: {"attention"}},
    "adafv": {0: {"text", "saliency"}},
    "zspaprune": {0: {"relevance"}},
    "adaptprune": {2: {"attention", "corrected", "rank"}},
    "dart": {2: set()},
    "evs": {0: {"dissimilarity"}},
    "vidcom2": {0: {"redundancy"}},
    "cdpruner": {0: {"relevance", "quality", "rank"}},
    "scope": {0: {"rank"}},
    "mmtok": {0: {"rank"}},
    "pyramiddrop": {2: {"attention"}},
    "visionzip": {0: set()},
    "sparsevlm": {2: {"attention"}},
    "vispruner": {0: set()},
    "idpruner": {0: {"importance", "rank"}},
    "fastv": {2: {"attention"}},
    "divprune": {0: {"rank"}},
    "random": {0: {"keys"}},
}


def forward(prompts: Prompts) -> None:
    with torch.no_grad():
        prompts.model(**prompts.inputs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tells_its_scores_and_its_order(method: str) -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        forward(prompts)
    names = {layer: set(told) for layer, told in pruning.saved.items()}
    assert names == TOLD.get(method, names)  # one that was added has its own test
    for layer, told in pruning.saved.items():
        for name, values in told.items():
            assert values.shape == (2, VISUAL)
            assert values.device.type == "cpu"
            if name == "rank":  # of exactly those that are left there
                kept = pruning.kept_at[layer]
                assert torch.equal((values >= 0).sum(1), torch.full((2,), kept.shape[1]))
                assert torch.equal(values.gather(1, kept).sort().values, torch.arange(kept.shape[1]).expand(2, -1))
            elif layer == 0 or method != "sts":
                assert not values.isnan().any()


def test_the_kept_tokens_are_those_with_the_best_scores() -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, "fastv", 9) as pruning:
        forward(prompts)
    scores = pruning.saved[2]["attention"]
    assert torch.equal(scores.topk(9).indices.sort().values, pruning.kept)


def told_by_hand(features: Any, present: Any, k: int) -> Selection:
    """Scores and an order that say which row and token they are of; nothing else of a token's number of entries."""
    rows, tokens = present.shape
    first = features[..., 0].float()
    order = torch.arange(tokens - 1, -1, -1).expand(rows, -1)[:, :k]
    details = {"first": first, "order": order, "gains": torch.ones(rows, k), "one": torch.ones(rows)}
    return Selection(order.sort().values, torch.full((rows,), k), details)


@pytest.mark.parametrize(
    ("keep", "per"), [(9, None), ([9, 4], "sample"), ([9, 4, VISUAL, 5], "image"), ([7, 7, 7, 7], "image")]
)
def test_details_of_rows_come_to_the_tokens_of_the_prompt(keep: Any, per: str | None) -> None:
    """Of calls for whole samples, for samples with other budgets, and for single images."""
    prompts = llava(2, ragged=True, images=2)
    seen = []

    def method(features: Any, present: Any, k: int) -> Selection:
        seen.append(features)
        return told_by_hand(features, present, k)

    with prune_visual_tokens(prompts.model, method, 72) as pruning:
        forward(prompts)
        assert pruning.saved == {}  # nothing was chosen
    with prune_visual_tokens(prompts.model, lambda features, k: features[..., 0].float().topk(k).indices, 9) as pruning:
        forward(prompts)
        assert pruning.saved == {0: {}}  # no Selection
    with prune_visual_tokens(prompts.model, method, 9) as pruning:
        forward(prompts)
    first = seen[-1][..., 0].float()
    with prune_visual_tokens(prompts.model, method, keep, per=per) as pruning:
        forward(prompts)
    told = pruning.saved[0]
    budgets = [9, 9] if per is None else keep
    wide = 72 if per != "image" else VISUAL
    rank = torch.full((4 if per == "image" else 2, wide), -1)
    for row, k in enumerate(budgets):
        rank[row, wide - k :] = torch.arange(k - 1, -1, -1)
    all_kept = torch.tensor([k == wide for k in budgets]).unsqueeze(1).expand_as(rank)
    rank = torch.where(all_kept, -1, rank)
    assert set(told) == {"first", "rank"}
    assert torch.equal(told["rank"].view_as(rank), rank)
    expected = torch.where(all_kept, torch.nan, first.view_as(rank))
    torch.testing.assert_close(told["first"].view_as(rank), expected, equal_nan=True, rtol=0, atol=0)


def test_tokens_that_were_dropped_before_have_no_scores() -> None:
    prompts = llava(1)
    with prune_visual_tokens(prompts.model, "fastv", {1: 0.5, 3: 0.25}) as pruning:
        forward(prompts)
    scored = ~pruning.saved[3]["attention"].isnan()
    assert torch.equal(scored[0].nonzero().flatten(), pruning.kept_at[1][0])


def test_what_is_saved_is_of_the_prefill_that_was_finished_last() -> None:
    prompts = llava(2)
    one = {name: value[:1] for name, value in prompts.inputs.items()}
    with prune_visual_tokens(prompts.model, "fastv", 9) as pruning:
        assert pruning.saved == {}
        forward(prompts)
        both = pruning.saved[2]["attention"]
        forward(Prompts(prompts.model, one, prompts.visual))
    torch.testing.assert_close(pruning.saved[2]["attention"], both[:1])


# --- overlays ---------------------------------------------------------------------------------------------------------

COLOURS = [(200, 100, 40), (40, 200, 100), (100, 40, 200), (200, 200, 40), (40, 100, 100)]


def cut(whole: Image.Image, number: int, size: tuple[int, int], columns: int = 4) -> Image.Image:
    left, top = number % columns * (size[0] + GAP), number // columns * (size[1] + GAP)
    return whole.crop((left, top, left + size[0], top + size[1]))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("as_array", [False, True])
def test_several_images_are_panels_of_a_sheet(first: int, as_array: bool) -> None:
    prompts = llava(2, images=3)
    with prune_visual_tokens(prompts.model, "random", 30, seed=1) as pruning:
        forward(prompts)
    images: Any = [Image.new("RGB", (60, 48), colour) for colour in COLOURS[: 3 - first]]
    single = [pruning.overlay(image, sample=1, image_index=first + n) for n, image in enumerate(images)]
    given = np.stack([np.asarray(image) for image in images]) if as_array else images
    whole = pruning.overlay(given, sample=1, image_index=first)
    assert whole.size == (len(images) * 60 + (len(images) - 1) * GAP, 48)
    for number, panel in enumerate(single):
        assert cut(whole, number, (60, 48)).tobytes() == panel.tobytes()


def test_a_video_has_a_panel_for_every_frame_in_rows_of_four() -> None:
    prompts = prompts_of("internvl", "video")  # the second sample: an image, and two frames
    with prune_visual_tokens(prompts.model, "random", 0.5, seed=1) as pruning:
        forward(prompts)
    frames = torch.stack([torch.tensor(colour).expand(32, 32, 3) for colour in COLOURS[:3]]).to(torch.uint8)
    whole = pruning.overlay(frames, sample=0)
    for number in range(3):
        alone = pruning.overlay(Image.fromarray(frames[number].numpy()), image_index=number)
        assert cut(whole, number, (32, 32)).tobytes() == alone.tobytes()
    prompts = llava(1, images=5)
    with prune_visual_tokens(prompts.model, "random", 30, seed=1) as pruning:
        forward(prompts)
    whole = pruning.overlay([Image.new("RGB", (30, 30), colour) for colour in COLOURS])
    assert whole.size == (4 * 30 + 3 * GAP, 2 * 30 + GAP)
    last = pruning.overlay(Image.new("RGB", (30, 30), COLOURS[4]), image_index=4)
    assert cut(whole, 4, (30, 30)).tobytes() == last.tobytes()


def test_wrong_images_are_refused() -> None:
    prompts = llava(1, images=2)
    with prune_visual_tokens(prompts.model, "random", 9) as pruning:
        forward(prompts)
    image = Image.new("RGB", (30, 30))
    with pytest.raises(ValueError, match=r"sample 0 has 2 images or frames from number 0 on, got 4; .*\[::2\]"):
        pruning.overlay([image] * 4)
    with pytest.raises(ValueError, match=r"\[height, width, 3\] in uint8, got \[3, 30, 30\] in float32"):
        pruning.overlay(np.zeros((3, 30, 30), np.float32))
