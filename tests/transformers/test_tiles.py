"""Idefics3, SmolVLM and Ovis2: tiles that lie as the tokens between them say, and how salient their tokens are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers.vlm import models_tiles as models
from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import CLOSE, LAYER
from tests.transformers.vlm.layouts import check_layout, layout_for, tiles, whole
from tests.transformers.vlm.models import IMAGE, Prompts, left_padded
from tests.transformers.vlm.runs_crops import (
    assert_saliency,
    beams_are_repeated_after_encoding,
    blocks,
    generate,
    pruned,
    vision_weights,
)
from tokenprune_kernels.integrations.transformers.adapters import idefics3, ovis2

FENCED = (models.idefics3, models.smolvlm)
ALL = (*FENCED, models.ovis2)
over_all = pytest.mark.parametrize("make", ALL)
TILE = [IMAGE] * models.TOKENS


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FENCED)
def test_layout_of_tiles_in_front_of_the_thumbnail(make: Callable[..., Prompts]) -> None:
    layout = layout_for(make())
    check_layout(layout, 0, tiles(1, 2, 0, 0) + whole(4, 2, 0) + whole(4, 3, 1))
    check_layout(layout, 1, tiles(2, 1, 0, 0) + whole(4, 2, 0))
    layout = layout_for(make(models.FRAMES))
    check_layout(layout, 0, [token for f in range(3) for token in whole(4, f, f)])
    check_layout(layout, 1, tiles(2, 2, 0, 0) + whole(4, 4, 0))


def test_layout_of_tiles_behind_the_thumbnail() -> None:
    layout = layout_for(models.ovis2())
    check_layout(layout, 0, whole(4, 0, 0) + tiles(1, 2, 1, 0) + whole(4, 3, 1))
    check_layout(layout, 1, whole(4, 0, 0) + tiles(2, 1, 1, 0))
    layout = layout_for(models.ovis2([[(2, 3)], [(0, 0), (3, 2)]]))
    check_layout(layout, 0, whole(4, 0, 0) + tiles(2, 3, 1, 0))
    check_layout(layout, 1, whole(4, 0, 0) + whole(4, 1, 1) + tiles(3, 2, 2, 1))


@pytest.mark.parametrize("merged", [True, False], ids=["one token", "two line breaks"])
def test_rows_in_the_prompt_of_idefics3(merged: bool) -> None:
    ids = [5, *models.fenced(3, 2, merged), *models.fenced(0, 0), 7, *models.fenced(1, 3, merged)]
    assert idefics3.rows_of(ids, IMAGE, models.TOKENS) == [[2, 2, 2], [], [3]]
    assert idefics3.rows_of([5, 6, 7], IMAGE, models.TOKENS) == []


def test_rows_in_the_prompt_of_ovis2() -> None:
    ids = [5, *models.indicated(3, 2), *models.indicated(0, 0), 7, *models.indicated(1, 3)]
    assert ovis2.rows_of(ids, IMAGE, models.TOKENS, models.INDICATORS) == [[2, 2, 2], [], [3]]


# --- what cannot be known is refused ----------------------------------------------------------------------------------


def with_ids(make: Callable[..., Prompts], ids: list[int]) -> Prompts:
    """A sample of two tiles and a thumbnail."""
    prompts = make([[(1, 2)]])
    return Prompts(prompts.model, {**prompts.inputs, **left_padded([ids])}, IMAGE, prompts.special)


TWO, FENCE, GLOBAL, ROW = models.FIRST, models.FENCE, models.GLOBAL, models.ROW
OUT_OF_ORDER = {
    "no thumbnail": (
        models.idefics3,
        [5, FENCE, TWO, *TILE, FENCE, 7, *TILE, FENCE, 8, *TILE, 9],
        "without a thumbnail",
    ),
    "no fences": (models.smolvlm, [5, 6, *TILE, 7, 8, *TILE, 9, 10, *TILE, 9], "not preceded by the same two tokens"),
    "tiles together": (models.smolvlm, [5, FENCE, GLOBAL, *TILE, *TILE, *TILE, 9], "48 visual tokens stand together"),
    "no indicator": (models.ovis2, [5, models.START, *TILE, 7, *TILE, ROW, *TILE, 9], "a tile behind token 7"),
}


@pytest.mark.parametrize("case", OUT_OF_ORDER)
def test_tiles_that_are_not_where_the_processor_puts_them_are_refused_where_a_layout_is_needed(case: str) -> None:
    make, ids, message = OUT_OF_ORDER[case]
    prompts = with_ids(make, ids)
    with pytest.raises(NotImplementedError, match=message), pruned(prompts, "adaptprune", 5):
        generate(prompts, 1)
    with pruned(prompts, "adafv", 5) as pruning:
        generate(prompts, 1)
    assert pruning.stats["after"] == [5]
    with pytest.raises(NotImplementedError, match=message):
        pruning.boxes()


def test_rows_of_unequal_length_are_refused() -> None:
    ids = [5, models.START, *TILE, models.GRID, *TILE, models.COLUMN, *TILE, ROW, *TILE, models.END]
    prompts = models.ovis2([[(1, 3)]])
    prompts = Prompts(prompts.model, {**prompts.inputs, **left_padded([ids])}, IMAGE, prompts.special)
    with pytest.raises(NotImplementedError, match="rows of 2, 1 tiles"), pruned(prompts, "adaptprune", 5):
        generate(prompts, 1)


@pytest.mark.parametrize("method", ["adaptprune", "adafv"])
def test_tiles_that_are_masked_in_part_are_refused_by_what_depends_on_them(method: str) -> None:
    prompts = models.smolvlm()
    mask = prompts.inputs["pixel_attention_mask"].clone()
    mask[0, 0, :, 8:] = 0
    prompts = Prompts(prompts.model, {**prompts.inputs, "pixel_attention_mask": mask}, IMAGE)
    with pruned(prompts, method, 5), pytest.raises(NotImplementedError, match="masks a part of a tile"):
        generate(prompts, 1)
    with pruned(prompts, "coast", 5) as pruning:
        generate(prompts, 1)
    assert pruning.stats["after"] == [5, 5]


def test_tiles_that_are_no_squares_are_refused() -> None:
    prompts = models.idefics3([[(0, 0)]])
    inputs = {**prompts.inputs, "pixel_values": torch.randn(1, 1, 3, 8, 32)}  # as many patches as 16 x 16
    del inputs["pixel_attention_mask"]
    refused = pytest.raises(NotImplementedError, match="got 8 x 32 pixels")
    with torch.no_grad(), pruned(prompts, "adaptprune", 5), refused:
        prompts.model(**inputs)


# --- saliency and beams -----------------------------------------------------------------------------------------------


def received(prompts: Prompts, attention: str, tower: str) -> list[Tensor]:
    """Of each tile of RAGGED, in the order of the tower, the mean of each 2 x 2 block of patches."""
    (weights,) = vision_weights(prompts, attention, -1, tower)
    found = [blocks(tile) for tile in weights.mean((1, 2)).view(-1, 8, 8)]
    assert len(found) == 4 + 3
    return found


@over_all
def test_saliency_is_the_attention_received(make: Callable[..., Prompts], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make()
    where = ("attention", "vision_tower.transformer") if make is models.ovis2 else ("self_attn", "vision_model")
    found = received(prompts, *where)
    assert_saliency(prompts, [torch.cat(found[:4]), torch.cat(found[4:])], monkeypatch)


@pytest.mark.parametrize("method", ["adafv", "adaptprune"])
@over_all
def test_beams_keep_what_their_sample_keeps(make: Any, method: str) -> None:
    prompts = make()
    if not beams_are_repeated_after_encoding(prompts):
        pytest.skip("this version of transformers repeats tile by tile, which mixes the images of samples up")
    with pruned(prompts, method, 0.4) as pruning:
        generate(prompts, 2)
        alone = pruning.kept
        generate(prompts, 2, num_beams=3)
    assert torch.equal(pruning.kept, alone.repeat_interleave(3, 0))


@over_all
def test_a_compacted_cache_and_decoding_by_hand(make: Callable[..., Prompts]) -> None:
    """The core makes the cache itself, which it hands to a decoder that it may call its text model."""
    prompts = make()
    new = torch.tensor([[17, 40], [33, 58]])
    mask = prompts.inputs["attention_mask"]
    with torch.no_grad(), pruned(prompts, "coast", 0.3, compact_cache=True) as pruning:
        out = prompts.model(**prompts.inputs, use_cache=True)
        steps = [out.logits[:, -1]]
        for at in range(2):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            cache = {"past_key_values": out.past_key_values}
            out = prompts.model(input_ids=new[:, at : at + 1], attention_mask=mask, **cache)
            steps.append(out.logits[:, -1])
    drop = oracle.Drop(LAYER, oracle.dropped_columns(prompts, pruning.kept), everywhere_for_new_rows=True)
    # The model alone goes on at the position behind the columns of the prompt, its padding among them.
    expected = oracle.logits(prompts, [drop], new)[:, -3:]
    torch.testing.assert_close(torch.stack(steps, 1).double(), expected, **CLOSE)
