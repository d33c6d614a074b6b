"""When a layout is asked for: by the methods that use one, and by boxes; and what it is made from then."""

import dataclasses
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch

from tests.transformers.vlm.checks import ON_LAYOUT, options_of
from tests.transformers.vlm.models import Prompts, llava
from tests.transformers.vlm.models_crops import internvl
from tests.transformers.vlm.models_towers import pixtral
from tests.transformers.vlm.runs_crops import FAMILIES, generate, prompts_of, pruned
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens, registry


class AskedError(Exception):
    pass


def no_layout(*_: Any) -> Any:
    raise AskedError


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_that_use_a_layout_and_boxes_ask_for_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = llava(2, ragged=True)
    family = dataclasses.replace(registry.family_of(prompts.model), layout=no_layout)
    monkeypatch.setitem(registry._FAMILIES, "llava", family)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        if method in ON_LAYOUT:
            with pytest.raises(AskedError):
                prompts.model(**prompts.inputs)
            return
        prompts.model(**prompts.inputs)
    assert pruning.stats["after"] == [9, 9]
    for ask in (pruning.boxes, lambda: pruning.overlay(None)):
        with pytest.raises(AskedError):
            ask()


def encoded_outside(prompts: Prompts) -> dict[str, Any]:
    if "mm_encoder_outputs" not in inspect.signature(prompts.model.forward).parameters:
        pytest.skip("this version of transformers takes no encoded images")
    text = {name: prompts.inputs[name] for name in ("input_ids", "attention_mask")}
    images = {name: t for name, t in prompts.inputs.items() if name not in text}
    with torch.no_grad():
        encoded = prompts.model.get_image_features(**images, return_dict=True)
    return {**text, "mm_encoder_outputs": {"image": encoded}}


@pytest.mark.parametrize("family", [*FAMILIES, "llava"])
def test_images_encoded_outside_the_block_are_refused_where_their_sizes_are_needed(family: str) -> None:
    prompts = llava(2) if family == "llava" else prompts_of(family, "ragged")
    inputs = encoded_outside(prompts)
    with torch.no_grad():
        with pruned(prompts, "fastv", 5) as pruning:
            expected = prompts.model(**prompts.inputs).logits
            boxes = pruning.boxes()
            assert torch.equal(prompts.model(**inputs).logits, expected)
        with pytest.raises(NotImplementedError, match="encode the images inside the block, their sizes are needed"):
            pruning.boxes()
        for method in ON_LAYOUT:
            with pruned(prompts, method, 5), pytest.raises(NotImplementedError, match="inside the block"):
                prompts.model(**inputs)
    assert 0 < len(boxes) <= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache_the_layout_is_that_of_the_first_step(family: str) -> None:
    prompts = prompts_of(family, "ragged")
    stop = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    visual = torch.tensor(prompts.visual).flatten().tolist()
    with pruned(prompts, "adaptprune", 9) as pruning:
        generate(prompts, 1)
        first = pruning.kept, pruning.boxes()
        prompts.model.generate(**prompts.inputs, **stop, use_cache=False, suppress_tokens=visual)
        assert pruning.stats["prefills"] == 4
        assert pruning.kept.shape == first[0].shape
        prompts.model.generate(**prompts.inputs, **{**stop, "max_new_tokens": 1, "min_new_tokens": 1}, use_cache=False)
        assert torch.equal(pruning.kept, first[0])
        assert torch.equal(pruning.boxes(), first[1])


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_what_waits_for_boxes_holds_neither_images_nor_caches(family: str) -> None:
    prompts = llava(2) if family == "llava" else FAMILIES[family]()
    pixels = prompts.inputs.pop("pixel_values").clone()
    with torch.no_grad(), pruned(prompts, "coast", 9) as pruning:
        out = prompts.model(**prompts.inputs, pixel_values=pixels, use_cache=True)
        cache = next(value for value in out.values() if hasattr(value, "layers"))
        large = [weakref.ref(pixels), weakref.ref(cache)]
        del pixels, out, cache
        gc.collect()
        assert [ref() for ref in large] == [None, None]
        assert len(pruning.boxes()) > 0


# --- no grid is guessed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 36), (20, 32), (4, 12)])
def test_boxes_of_pixtral_are_parts_of_the_images_own_grid(size: tuple[int, int]) -> None:
    """36 patches in 4 x 9, 40 that are no square, and 3 in a row."""
    prompts = pixtral([[size]])
    rows, columns = size[0] // 4, size[1] // 4
    with pruned(prompts, "random", 3) as pruning:
        generate(prompts, 1)
    assert pruning.kept is not None
    coordinates = [divmod(token, columns) for token in pruning.kept[0].tolist()]
    expected = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r, c in coordinates]
    torch.testing.assert_close(pruning.boxes(), torch.tensor(expected))


def test_tiles_that_fit_in_several_ways_have_no_boxes_but_are_pruned() -> None:
    prompts = internvl([[(16, 48)], [(16, 16)]])  # 1 x 3 tiles with a thumbnail, and one
    plain = prompts.inputs["pixel_values"].clone()
    plain[:4] = plain[0, 0, 0, 0]  # of one colour
    with torch.no_grad(), pruned(prompts, "adaptprune", 9) as pruning:
        prompts.model(**{**prompts.inputs, "pixel_values": plain})
        with pytest.raises(NotImplementedError, match="image 0 of sample 0 came in tiles, and how they were arranged"):
            pruning.boxes()
        assert len(pruning.boxes(sample=1)) == 9
        prompts.model(**prompts.inputs)
        assert len(pruning.boxes()) == 9


def test_tiles_that_are_no_squares_are_refused() -> None:
    prompts = internvl([[(16, 16)]])
    pixels = torch.randn(1, 3, 8, 32)  # 16 x 16 as many patches
    with (
        torch.no_grad(),
        pruned(prompts, "adaptprune", 5),
        pytest.raises(NotImplementedError, match="got 8 x 32 pixels"),
    ):
        prompts.model(**{**prompts.inputs, "pixel_values": pixels})
