"""Budgets: a number for all, or one for each sample or image, and what a share keeps at least."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.transformers import test_qwen
from tests.transformers.test_merging import by_hand, first_and_changed
from tests.transformers.vlm import runs_crops, runs_qwen
from tests.transformers.vlm.checks import (
    CLOSE,
    FOUR,
    LAYER,
    RENUMBERED,
    assert_decoded_like_the_oracle,
    drops_of,
    generate,
    options_of,
    spy_on,
)
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens
from tokenprune_kernels.methods import get_method

WITHIN_IMAGES = [name for name in METHODS if get_method(name).within_images]
SEED = {"random": {"seed": 5}}
TOKENS = 36
# The arguments that have an entry for each visual token.
OF_TOKENS = {
    "features", "visual_embeddings", "unrotated_key", "saliency", "positions", "stacked_positions", "grid", "groups",
    "key_indices",
}  # fmt: skip


def forward(prompts: Prompts) -> Any:
    with torch.no_grad():
        return prompts.model(**prompts.inputs)


def kept_by_image(pruning: Any, layer: int | None = None) -> list[list[int]]:
    """How many tokens of each image are left, by sample."""
    kept = pruning.kept if layer is None else pruning.kept_at[layer]
    images = runs_crops.layout_in(pruning).images
    return [images[b][row[row >= 0]].bincount().tolist() for b, row in enumerate(kept)]


def images_in(pruning: Any) -> list[list[int]]:
    """How many tokens each image has in the prompt, by sample."""
    images = runs_crops.layout_in(pruning).images
    return [images[b][:n].bincount().tolist() for b, n in enumerate(pruning.stats["before"])]


# --- per image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITHIN_IMAGES)
def test_every_image_keeps_its_own_number_and_decoding_equals_the_float64_path(method: str) -> None:
    prompts = llava(2, ragged=True, images=2)
    options = {**options_of(method), **SEED.get(method, {})}
    with prune_visual_tokens(prompts.model, method, [4, 0.25, TOKENS, 5], per="image", **options) as pruning:
        out = generate(prompts.model, prompts.inputs, 32)
    assert kept_by_image(pruning) == [[4, 9], [TOKENS, 5]]
    drops = drops_of(prompts, pruning, LAYER)
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=method in RENUMBERED)


@pytest.mark.parametrize("method", [name for name in WITHIN_IMAGES if name != "random"])
def test_an_images_tokens_are_those_that_the_function_picks_among_them(method: str, monkeypatch: Any) -> None:
    """Its arguments for whole samples, cut by hand: scores are of the whole prompt, candidates of one image."""
    prompts = llava(2, ragged=True, images=2)
    stage = get_method(method).stages[0]
    budgets = [[7, 11], [11, 3]]
    with prune_visual_tokens(
        prompts.model, method, [k for row in budgets for k in row], per="image", **options_of(method)
    ) as pruning:
        forward(prompts)
    _, kept = min(pruning.kept_at.items())
    seen: dict[str, Any] = {}

    def spy(**given: Any) -> Any:
        seen.update(given)
        return stage.function(**given)

    spy_on(monkeypatch, method, stage.name, spy)
    with prune_visual_tokens(prompts.model, method, 20, **options_of(method)):
        forward(prompts)
    assert seen.pop("mask", None) is None
    given = {name: value for name, value in seen.items() if name != "k"}
    for b, row in enumerate(budgets):
        want = []
        for image, k in enumerate(row):
            cut = slice(TOKENS * image, TOKENS * (image + 1))
            own = {
                name: (value[b : b + 1, cut] if stage.arguments[name] in OF_TOKENS else value[b : b + 1])
                if isinstance(value, torch.Tensor)
                else value
                for name, value in given.items()
            }
            own |= {"count": TOKENS} if "count" in own else {}
            want.append(stage.function(k=min(TOKENS, stage.share * k), **own).indices[0] + cut.start)
        assert torch.equal(kept[b][kept[b] >= 0], torch.cat(want))


SEVERAL = {
    **{name: lambda name=name: runs_crops.prompts_of(name, "several") for name in runs_crops.FAMILIES},
    **{name: lambda name=name: runs_qwen.batch(name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    "onevision video": lambda: runs_crops.prompts_of("llava_onevision", "video"),
    "internvl video": lambda: runs_crops.prompts_of("internvl", "video"),
}


@pytest.mark.parametrize("family", SEVERAL)
def test_images_and_frames_of_any_size_on_every_family(family: str) -> None:
    """A schedule of shares; the frames of a video are images."""
    prompts = SEVERAL[family]()
    with prune_visual_tokens(prompts.model, "coast", {1: 0.5, 3: 0.25}, per="image", min_keep=2) as pruning:
        out = generate(
            prompts.model, prompts.inputs, 32, suppress_tokens=torch.tensor(prompts.visual).flatten().tolist()
        )
    images = images_in(pruning)
    assert max(map(len, images)) > 1
    for layer, share in ((1, 2), (3, 4)):
        assert kept_by_image(pruning, layer) == [[max(2, n // share) for n in sample] for sample in images]
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, 0), out, close=test_qwen.CLOSE)


@torch.no_grad()
def test_merged_rows_of_each_image_take_their_places() -> None:
    prompts = llava(1, images=2)
    with prune_visual_tokens(prompts.model, first_and_changed, [3, 5], per="image"):
        got = prompts.model(**prompts.inputs).logits[:, -1]
    kept = torch.cat([torch.arange(3), TOKENS + torch.arange(5)])
    torch.testing.assert_close(got[0], by_hand(prompts.model, prompts.inputs, kept), **CLOSE)


@pytest.mark.parametrize("method", FOUR)
def test_of_one_image_per_sample_both_units_are_the_same(method: str) -> None:
    prompts = llava(2, ragged=True)
    logits = []
    for per in ("sample", "image"):
        with prune_visual_tokens(prompts.model, method, [9, 4], per=per, **options_of(method)):
            logits.append(forward(prompts).logits[:, -1])
    assert torch.equal(*logits)


# --- nothing dropped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FOUR)
@pytest.mark.parametrize(("keep", "per"), [([1.0, 99, TOKENS, 1.0], "image"), ([1.0, 72], "sample")])
def test_keeping_all_of_every_image_or_sample_changes_no_bit(method: str, keep: Any, per: str) -> None:
    prompts = llava(2, ragged=True, images=2)
    plain = generate(prompts.model, prompts.inputs, 2)
    with prune_visual_tokens(prompts.model, method, keep, per=per, **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 2)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    assert pruning.stats["layers"] == []


# --- per sample -------------------------------------------------------------------------------------------------------


LISTS = [
    (9, 0.5), np.array([9, 18]), torch.tensor([9, 18]), [np.int32(9), torch.tensor(0.5)],
    torch.tensor([0.25, 0.5], dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("method", "keep"), [("adafv", [9, 0.5]), *(("coast", keep) for keep in LISTS)], ids=str)
def test_every_sample_keeps_its_own_number(method: str, keep: Any) -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, method, keep, per="sample", **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 4)
    assert pruning.stats["after"] == [9, 18]
    drops = drops_of(prompts, pruning, LAYER)
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=method in RENUMBERED)


@pytest.mark.parametrize(("keep", "per"), [([9, 18], "sample"), ([4, 5, 6, 12], "image")])
def test_generates_copies_of_a_sample_have_its_number(keep: list[int], per: str) -> None:
    prompts = llava(2, ragged=True, images=2)
    for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with prune_visual_tokens(prompts.model, "coast", keep, per=per, layer=LAYER) as pruning:
            generate(prompts.model, prompts.inputs, 2, **more)
        assert pruning.stats["after"] == [9, 9, 18, 18]


def test_a_list_of_another_length_than_the_call_is_refused() -> None:
    prompts = llava(2, images=2)
    for keep, per, there in (([9, 9, 9], "sample", 2), ([9, 9], "image", 4)):
        with (
            prune_visual_tokens(prompts.model, "divprune", keep, per=per),
            pytest.raises(ValueError, match=rf"keep must have a number per {per} of the call, {there}, got \[9, 9"),
        ):
            forward(prompts)


# --- at least ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "per", "counts"),
    [
        (0.1, None, [[5, 2]]),
        (0.01, None, [[5, 1]]),
        (0.1, "image", [[6, 6]]),
        ([0.1, 3], "image", [[6, 3]]),
        ([0.5, 0.1], "image", [[18, 6]]),
        (np.float32(0.001), "image", [[6, 6]]),
    ],
)
def test_a_share_keeps_at_least_so_many(keep: Any, per: str | None, counts: list[list[int]]) -> None:
    prompts = llava(1, images=2)
    with prune_visual_tokens(prompts.model, "divprune", keep, per=per, min_keep=np.int64(6)) as pruning:
        forward(prompts)
    if per is None:
        assert pruning.stats["after"] == [max(6, round(72 * keep))]
    else:
        assert kept_by_image(pruning) == counts


def test_no_sample_keeps_more_than_it_has_and_a_schedule_knows_the_least_too() -> None:
    prompts = llava(1)
    for keep, least, counts in ((0.1, 99, {}), ({1: 0.5, 2: 0.2, 3: 0.1}, 8, {1: 18, 2: 8})):
        with prune_visual_tokens(prompts.model, "fastv", keep, min_keep=least) as pruning:
            forward(prompts)
        assert {layer: kept.shape[1] for layer, kept in pruning.kept_at.items()} == counts


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": [9, 9]}, TypeError, r"per= must be 'sample' or 'image' to say which, got \[9, 9\] without it"),
        ({"keep": {1: [9, 9]}}, TypeError, "per= must be 'sample' or 'image'"),
        ({"per": "frame"}, ValueError, "per must be sample or image, got 'frame'"),
        ({"per": 1}, ValueError, "per must be sample or image, got 1"),
        ({"keep": [], "per": "image"}, ValueError, r"a list to keep has a number per image, got \[\]"),
        ({"keep": [9, 0], "per": "image"}, ValueError, "at least 1 token, got 0"),
        ({"keep": [9, 1.5], "per": "image"}, ValueError, r"\(0, 1\], got 1.5"),
        ({"keep": [9, True], "per": "image"}, TypeError, r"keep must be an int .*, got \[9, True\]"),
        ({"keep": [9, "9"], "per": "sample"}, TypeError, "keep must be an int"),
        ({"keep": [[9], [9]], "per": "sample"}, TypeError, "keep must be an int"),
        ({"keep": torch.ones(2, 2), "per": "sample"}, TypeError, "keep must be an int"),
        ({"keep": torch.tensor([True, False]), "per": "sample"}, TypeError, "keep must be an int"),
        ({"keep": {1: [9, 9], 2: [4, 10]}, "per": "image"}, ValueError, "must not grow .*, got 10 in front of layer 2"),
        ({"keep": {1: [9, 9], 2: 4}, "per": "image"}, ValueError, "as many numbers at every layer"),
        ({"min_keep": True}, TypeError, "min_keep must be an int .tokens. or None, got True"),
        ({"min_keep": 2.0}, TypeError, "min_keep must be an int .tokens. or None, got 2.0"),
        ({"min_keep": torch.tensor([2])}, TypeError, "min_keep must be an int"),
        ({"min_keep": 0}, ValueError, "min_keep must be at least 1 token, got 0"),
        ({"keep": 9, "min_keep": 2}, ValueError, "min_keep is the least that a share keeps, .* got 9"),
        ({"keep": {1: 9}, "min_keep": 2}, ValueError, "min_keep is the least that a share keeps"),
        ({"method": "evs", "per": "image"}, NotImplementedError, "evs compares images or frames with each other"),
        ({"method": "vidcom2", "per": "image"}, NotImplementedError, "vidcom2 compares images or frames"),
    ],
)
def test_a_wrong_budget_is_refused_on_entering(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        prune_visual_tokens(llava().model, **{"method": "fastv", "keep": 0.5, **arguments})
