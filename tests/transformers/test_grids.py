"""Where the tokens of images lie, and how salient the tower makes them, computed by hand: towers whose images have any
size, one size, or two views; and what methods are given of a decoder that attends with other than its hidden states."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.transformers.vlm import (
    models_hybrid,
    models_merged,
    models_molmo2,
    models_squares,
    models_timm,
    models_window,
    oracle,
)
from tests.transformers.vlm.checks import LAYER, drops_of
from tests.transformers.vlm.layouts import assert_salient, check_layout, layout_for, seen_by_methods, whole
from tests.transformers.vlm.models import Prompts
from tests.transformers.vlm.models_window import BEFORE_VIDEO, FLAT, FRAMES, SIZES
from tests.transformers.vlm.runs_crops import generate, pruned
from tokenprune_kernels.integrations.transformers import prune_visual_tokens


@functools.cache
def built(function: Callable[[], Prompts]) -> Prompts:
    """Shared by all tests: leaving a block restores the model."""
    try:
        return function()
    except ImportError as lacking:
        pytest.skip(f"transformers {transformers.__version__}: {lacking}")


def weights_of(prompts: Prompts, attention: Callable[[Any], Any]) -> list[Tensor]:
    """[images, heads, queries, keys] in float64 of an attention of the tower, of each of its runs."""
    exact = oracle.in_float64(prompts)
    module = attention(exact.model.model)
    seen: list[Tensor] = []

    def attend(
        m: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float, **_: Any
    ) -> Any:
        logits = query @ key.mT * scaling
        weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
        if m is module:
            seen.append(weights)
        return (weights @ value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("showing_weights", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("showing_weights", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    module.config._attn_implementation = "showing_weights"
    with torch.no_grad():
        exact.model(**exact.inputs)
    return seen


def blocks(received: Tensor, height: int, width: int) -> Tensor:
    """The mean over blocks of 2 x 2 of `received` [height * width]; a row or column without a partner is left out."""
    grid = received.view(height, width)[: height // 2 * 2, : width // 2 * 2]
    return torch.stack([grid[r::2, c::2] for r in (0, 1) for c in (0, 1)]).mean(0).flatten()


# --- images of any size -----------------------------------------------------------------------------------------------


def of_one_sequence(weights: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
    starts = [sum(h * w for h, w in grids[:i]) for i in range(len(grids))]
    here = [slice(start, start + h * w) for start, (h, w) in zip(starts, grids, strict=True)]
    return [weights[0][0, :, each, each].mean((0, 1)) for each in here]


def of_padded_images(weights: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
    return [each[:, : h * w, : h * w].mean((0, 1)) for each, (h, w) in zip(weights[0], grids, strict=True)]


def of_runs(weights: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
    return [each[0].mean((0, 1)) for each in weights]


# The prompts, the sizes of their images, whether the processor leaves no patch without a partner, and the attention.
ANY_SIZE = {
    "lighton_ocr": (
        models_merged.lighton_ocr, SIZES, False, lambda core: core.vision_encoder.transformer.layers[-1].attention,
        of_one_sequence,
    ),
    "paddleocr_vl": (
        models_merged.paddleocr_vl, SIZES, True, lambda core: core.visual.vision_model.encoder.layers[-1].self_attn,
        of_runs,
    ),
    "lfm2_vl": (
        models_merged.lfm2_vl, FLAT, True, lambda core: body(core.vision_tower).encoder.layers[-1].self_attn,
        of_padded_images,
    ),
}  # fmt: skip


def body(tower: Any) -> Any:
    return getattr(tower, "vision_model", tower)


@pytest.mark.parametrize("family", ANY_SIZE)
def test_blocks_of_images_of_any_size(family: str) -> None:
    function, images, even, attention, received = ANY_SIZE[family]
    prompts = built(function)
    salient, layout = seen_by_methods(prompts)
    grids = [(height // 4, width // 4) for sample in images for height, width in sample]
    if even:
        grids = [(height // 2 * 2, width // 2 * 2) for height, width in grids]
    values = received(weights_of(prompts, attention), grids)
    each = [blocks(value, *grid) for value, grid in zip(values, grids, strict=True)]
    assert_salient(salient[0], each[0])
    assert_salient(salient[1], torch.cat(each[1:]))
    expected = [whole((height // 2, width // 2), 0, 0) for height, width in grids]
    if not even:  # 9 x 11 patches
        expected[0] = [
            (r, c, (4, 5), 0, 0, (2 * c / 11, 2 * r / 9, 2 * (c + 1) / 11, 2 * (r + 1) / 9))
            for r in range(4)
            for c in range(5)
        ]
    second = [(r, c, grid, 1, 1, box) for r, c, grid, _, _, box in expected[2]]
    check_layout(layout, 0, expected[0])
    check_layout(layout, 1, [*expected[1], *second])


# --- images of one size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_vl", "deepseek_vl_hybrid", "janus"])
def test_squares_of_patches(family: str) -> None:
    prompts = built(getattr(models_squares, family))
    salient, layout = seen_by_methods(prompts)
    (weights,) = weights_of(prompts, lambda core: body(core.vision_model).encoder.layers[-1].self_attn)
    images = weights.mean((1, 2))
    assert_salient(salient[0], images[0])
    assert_salient(salient[1], images[1:].flatten())
    check_layout(layout, 0, whole(5, 0, 0))
    check_layout(layout, 1, [*whole(5, 0, 0), *whole(5, 1, 1)])


@pytest.mark.parametrize("function", [models_squares.got_ocr2, models_timm.gemma3n])
def test_squares_of_what_a_tower_of_convolutions_gives(function: Callable[[], Prompts]) -> None:
    layout = layout_for(built(function))
    check_layout(layout, 0, whole(5, 0, 0))
    check_layout(layout, 1, [*whole(5, 0, 0), *whole(5, 1, 1)])


def test_tiles_and_frames_of_perception_lm() -> None:
    layout = layout_for(built(models_timm.perception_lm))
    check_layout(layout, 0, [token for i in range(3) for token in whole(5, i, i)])
    check_layout(layout, 1, [*whole(5, 0, 0), *whole(5, 1, 1)])


# --- views and frames -------------------------------------------------------------------------------------------------


def pooled(prompts: Prompts, pooling: Tensor) -> Tensor:
    """The mean over the patches of each token, one token after the other."""
    (weights,) = weights_of(prompts, lambda core: core.vision_tower.layers[-1].self_attn)
    received = weights.mean((1, 2)).flatten()
    return torch.stack([received[patches[patches >= 0]].mean() for patches in pooling])


def test_slices_and_frames_of_minicpmv() -> None:
    prompts = built(models_hybrid.minicpmv)
    salient, layout = seen_by_methods(prompts)
    seen = weights_of(prompts, lambda core: core.vision_tower.encoder.layers[-1].self_attn)
    # The last layer attends to what its tower has merged 2 x 2 to one.
    grids = [
        (r // 2, c // 2) for sizes in (models_hybrid.SLICES, models_hybrid.FRAMES) for each in sizes for r, c in each
    ]
    values = [blocks(weights[0].mean((0, 1)), *grid) for weights, grid in zip(seen, grids, strict=True)]
    order = [[0, 1, 3, 4], [2, 5]]  # images are encoded in front of videos
    for b, numbers in enumerate(order):
        assert_salient(salient[b], torch.cat([values[n] for n in numbers]))
        expected = [whole((grids[n][0] // 2, grids[n][1] // 2), i, i) for i, n in enumerate(numbers)]
        check_layout(layout, b, [token for tokens in expected for token in tokens])


def test_views_of_molmo2() -> None:
    prompts = built(models_molmo2.images)
    salient, layout = seen_by_methods(prompts)
    expected = pooled(prompts, prompts.inputs["image_token_pooling"])
    # 4 x 4 patches, and 4 x 7 of two crops; 4 x 4 twice, and then 7 x 4.
    assert_salient(salient[0], expected[: 4 + 8])
    assert_salient(salient[1], expected[4 + 8 :])
    check_layout(layout, 0, [*whole(2, 0, 0), *whole((2, 4), 1, 0)])
    check_layout(layout, 1, [*whole(2, 0, 0), *whole(2, 1, 0), *whole(2, 2, 1), *whole((4, 2), 3, 1)])


def test_frames_of_molmo2() -> None:
    prompts = built(models_molmo2.videos)
    salient, layout = seen_by_methods(prompts)
    expected = pooled(prompts, prompts.inputs["video_token_pooling"])
    assert_salient(salient[0], expected[:12])
    assert_salient(salient[1], expected[12:])
    for b, frames in enumerate((3, 2)):
        check_layout(layout, b, [token for frame in range(frames) for token in whole(2, frame, frame)])


def test_frames_of_which_the_processor_leaves_some_tokens_out() -> None:
    prompts = built(models_merged.video_llama_3)
    salient, layout = seen_by_methods(prompts)
    seen = weights_of(prompts, lambda core: core.vision_model.encoder.layers[-1].self_attn)
    # Images are encoded in front of videos, each frame by itself; the patches of a token stand together.
    frames = [weights[0].mean((0, 1)).view(-1, 4).mean(1) for weights in seen]
    grids = [(2, 3), (2, 2), (3, 3), *[(2, 2)] * 3, *[(2, 3)] * 2]
    stays = prompts.inputs["video_compression_mask"].split([4, 4, 4, 6, 6])
    for b, numbers in enumerate([[0, 1, 3, 4, 5], [2, 6, 7]]):
        values, expected = [], []
        for image, number in enumerate(numbers):
            left = stays[number - 3] if number >= 3 else torch.ones(len(frames[number]), dtype=torch.bool)
            values.append(frames[number][left])
            tokens = whole(grids[number], image, image)
            expected += [token for token, stay in zip(tokens, left.tolist(), strict=True) if stay]
        assert_salient(salient[b], torch.cat(values))
        check_layout(layout, b, expected)


def test_frames_of_gemma4() -> None:
    prompts = built(models_window.gemma4_video)
    salient, layout = seen_by_methods(prompts)
    images, frames = weights_of(prompts, lambda core: body(core.vision_tower).encoder.layers[-1].self_attn)
    # In patches of 4 x 4 pixels.
    sizes = [[(h // 4, w // 4) for each in sizes for h, w in each] for sizes in (BEFORE_VIDEO, FRAMES)]
    each = [
        [blocks(image[:, : h * w, : h * w].mean((0, 1)), h, w) for image, (h, w) in zip(run, grids, strict=True)]
        for run, grids in zip((images, frames), sizes, strict=True)
    ]
    assert_salient(salient[0], torch.cat([each[0][0], *each[1][:2]]))
    assert_salient(salient[1], torch.cat([each[0][1], *each[1][2:]]))
    check_layout(layout, 0, [*whole((2, 3), 0, 0), *whole((2, 4), 1, 1), *whole((2, 4), 2, 2)])
    check_layout(layout, 1, [*whole(2, 0, 0), *(token for i in (1, 2, 3) for token in whole((3, 2), i, i))])


# --- what a decoder attends with --------------------------------------------------------------------------------------


@contextmanager
def attending(config: Any) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Query and key of each layer of a decoder."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    before = config._attn_implementation

    def attend(module: Any, query: Tensor, key: Tensor, *args: Any, **more: Any) -> Any:
        seen[module.layer_idx] = query, key
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **more)

    ALL_ATTENTION_FUNCTIONS.register("attending", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("attending", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = "attending"
    try:
        yield seen
    finally:
        config._attn_implementation = before


@pytest.mark.parametrize(
    ("function", "layer"), [(models_timm.gemma3n, 2), (models_molmo2.olmo, 2), (models_merged.lfm2_vl, 3)]
)
def test_methods_read_what_the_layer_that_comes_attends_with(function: Callable[[], Prompts], layer: int) -> None:
    """Of Gemma 3n a prediction of one of several hidden states, of OLMo what is not normed."""
    prompts = built(function)
    given: list[tuple[Tensor, Tensor]] = []

    def spied(next_query: Tensor, next_key: Tensor, k: int) -> Tensor:
        given.append((next_query, next_key))
        return torch.arange(k).expand(len(next_key), -1)

    with torch.no_grad():
        with prune_visual_tokens(prompts.model, spied, 5, layer=layer):
            prompts.model(**prompts.inputs)
        with attending(prompts.model.get_decoder().config) as seen:
            prompts.model(**prompts.inputs)
    query, key = seen[layer]
    real = prompts.inputs["attention_mask"].bool()  # attention gives padding anything
    rows = given[0][0].shape[2]
    for b in range(len(real)):
        torch.testing.assert_close(given[0][1][b][:, real[b]], key[b][:, real[b]], rtol=0, atol=1e-6)
        last = real[b, -rows:]
        torch.testing.assert_close(given[0][0][b][:, last], query[b][:, -rows:][:, last], rtol=0, atol=1e-6)


def test_methods_read_one_of_several_hidden_states() -> None:
    prompts = built(models_timm.gemma3n)
    seen: list[Tensor] = []
    given: list[Tensor] = []

    def spied(features: Tensor, k: int) -> Tensor:
        given.append(features)
        return torch.arange(k).expand(len(features), -1)

    decoder = prompts.model.get_decoder()
    handle = decoder.layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    try:
        with torch.no_grad(), prune_visual_tokens(prompts.model, spied, 5, layer=2):
            prompts.model(**prompts.inputs)
    finally:
        handle.remove()
    is_visual = prompts.inputs["input_ids"] == prompts.visual
    hidden = seen[0][decoder.config.altup_active_idx]
    for b, features in enumerate(given[0]):
        expected = hidden[b, is_visual[b]]
        assert torch.equal(features[: len(expected)], expected)


def test_merging_is_refused_where_a_token_has_several_hidden_states() -> None:
    prompts = built(models_timm.gemma3n)
    refused = pytest.raises(NotImplementedError, match=r"merges tokens, and this decoder has 3 hidden states of each")
    with torch.no_grad(), prune_visual_tokens(prompts.model, "sparsevlm", 0.4), refused:
        prompts.model(**prompts.inputs)


def test_tokens_that_see_each_other_on_a_static_cache() -> None:
    prompts = built(models_molmo2.images)
    with pruned(prompts, "coast", 0.4) as pruning:
        new, logits = generate(prompts, 4, cache_implementation="static")
    expected = oracle.logits(prompts, drops_of(prompts, pruning, LAYER), new[:, :-1])[:, -4:]
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
