"""LLaVA-NeXT-Video and Video-LLaVA: where the tokens of images and frames lie, and how salient they are."""

import math
from typing import Any

import pytest
import torch

from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import CLOSE, LAYER
from tests.transformers.vlm.layouts import Token, check_layout, layout_for, whole, wide_crops
from tests.transformers.vlm.models_video import FRAMES, llava_next_video, video_llava_images, video_llava_videos
from tests.transformers.vlm.runs_crops import (
    assert_saliency,
    beams_are_repeated_after_encoding,
    generate,
    pruned,
    shrunk,
    vision_weights,
)


def test_frames_of_llava_next_video_are_pooled_and_see_what_fills_a_window() -> None:
    """5 x 5 patches in windows of 2 x 2: the last row and column are in none."""

    def video(group: int, image: int) -> list[Token]:
        return [token for f in range(FRAMES) for token in whole(2, group + f, image + f, part=4 / 5)]

    layout = layout_for(llava_next_video())
    check_layout(layout, 0, video(0, 0))
    check_layout(layout, 1, wide_crops(0, 0) + video(4, 1))


def test_images_of_video_llava() -> None:
    layout = layout_for(video_llava_images())
    check_layout(layout, 0, whole(3, 0, 0) + whole(3, 1, 1))
    check_layout(layout, 1, whole(3, 0, 0))


def test_class_tokens_of_video_llavas_frames_are_in_a_group_and_on_no_grid() -> None:
    def video(group: int, image: int) -> list[Token]:
        tokens: list[Token] = []
        for f in range(FRAMES):
            tokens.append((math.nan, math.nan, (3, 3), group + f, image + f, (0.0, 0.0, 0.0, 0.0)))
            tokens += whole(3, group + f, image + f)
        return tokens

    layout = layout_for(video_llava_videos())
    check_layout(layout, 0, video(0, 0))
    check_layout(layout, 1, whole(3, 0, 0) + video(1, 1))


def test_methods_without_a_grid_and_boxes_take_frames_with_class_tokens() -> None:
    prompts = video_llava_videos()
    with pruned(prompts, "divprune", 10, per="image") as pruning:  # all of a frame
        generate(prompts, 1)
    assert pruning.stats["after"] == [3 * 10, 9 + 3 * 10]
    assert len(pruning.boxes(sample=1, image_index=0)) == len(pruning.boxes(sample=1, image_index=3)) == 9
    with pruned(prompts, "divprune", 4, per="image") as pruning:
        generate(prompts, 1)
    assert pruning.stats["after"] == [3 * 4, 4 * 4]
    with pruned(prompts, "vidcom2", 8) as pruning:
        generate(prompts, 1)
    assert pruning.stats["after"] == [8, 8]


# --- saliency ---------------------------------------------------------------------------------------------------------


def test_saliency_of_llava_next_video(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = llava_next_video()
    crops, frames = (w[:, :, 0, 1:].mean(1).view(-1, 5, 5) for w in vision_weights(prompts, "self_attn", -2))
    assert len(crops) == 4
    videos = [torch.cat([shrunk(f[:4, :4], 2, 2).flatten() for f in each]) for each in frames.view(2, FRAMES, 5, 5)]
    wide = torch.cat([crops[1], crops[2], crops[3]], 1)[:, 2:13]
    image = torch.cat([crops[0].flatten(), torch.nn.functional.pad(wide, (0, 1)).flatten()])
    assert_saliency(prompts, [videos[0], torch.cat([image, videos[1]])], monkeypatch)


def test_saliency_of_video_llava_is_that_of_two_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = video_llava_videos()
    (image,) = vision_weights(prompts, "self_attn", -2, "image_tower")
    (frames,) = vision_weights(prompts, "self_attn", -2, "video_tower")
    videos = frames[:, :, 0].mean(1).view(2, -1)
    image = image[:, :, 0, 1:].mean(1).flatten()
    assert_saliency(prompts, [videos[0], torch.cat([image, videos[1]])], monkeypatch)


@pytest.mark.parametrize("method", ["adafv", "vidcom2"])
@pytest.mark.parametrize("make", [llava_next_video, video_llava_videos])
def test_beams_keep_what_their_sample_keeps(make: Any, method: str) -> None:
    prompts = make()
    if not beams_are_repeated_after_encoding(prompts):
        pytest.skip("this version of transformers repeats crop by crop, which mixes the images of samples up")
    with pruned(prompts, method, 0.4) as pruning:
        generate(prompts, 2)
        alone = pruning.kept
        generate(prompts, 2, num_beams=3)
    assert torch.equal(pruning.kept, alone.repeat_interleave(3, 0))


@pytest.mark.parametrize("make", [llava_next_video, video_llava_videos])
def test_compacted_cache(make: Any) -> None:
    prompts = make()
    with pruned(prompts, "coast", 0.3, compact_cache=True) as pruning:
        new, logits = generate(prompts, 5)
    drop = oracle.Drop(LAYER, oracle.dropped_columns(prompts, pruning.kept), everywhere_for_new_rows=True)
    torch.testing.assert_close(logits.double(), oracle.logits(prompts, [drop], new[:, :-1])[:, -5:], **CLOSE)
