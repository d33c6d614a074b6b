"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL under `prune_visual_tokens`: mRoPE, ragged images, videos, windows, DeepStack."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")


from tests.transformers.vlm import models_qwen as qwen
from tests.transformers.vlm import oracle
from tests.transformers.vlm.models import Prompts
from tests.transformers.vlm.runs_qwen import CLOSE, KEEP, batch, exact, generate, model
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

IMAGES = [[3, (1, 8, 12), 2, (1, 4, 8), 5], [2, (1, 8, 8), 4]]


@functools.cache
def images(name: str) -> Prompts:
    return qwen.prompts(model(name), IMAGES)


@contextmanager
def tower_calls(prompts: Prompts) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = prompts.model.model.visual.register_forward_hook(lambda m, a, o: calls.append(1))
    yield calls
    handle.remove()


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", qwen.NAMES)
def test_the_tower_runs_over_the_images_and_over_the_video_once(name: str) -> None:
    prompts = batch(name)
    with prune_visual_tokens(prompts.model, "adafv", KEEP), tower_calls(prompts) as calls:
        generate(prompts, 3)
    assert len(calls) == 2


@pytest.mark.parametrize("name", qwen.NAMES)
def test_a_count_that_only_one_sample_exceeds(name: str) -> None:
    prompts = images(name)
    with prune_visual_tokens(prompts.model, "coast", 20) as pruning:
        out, new = generate(prompts, 4)
    assert pruning.stats["after"] == [20, 16]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), exact(prompts, pruning, new), **CLOSE)


@pytest.mark.parametrize("name", qwen.NAMES)
def test_without_padding_there_is_no_mask(name: str) -> None:
    prompts = qwen.prompts(model(name), [[3, (1, 8, 12), 4]])
    with prune_visual_tokens(prompts.model, "sts", 6) as pruning:
        out, new = generate(prompts, 4)
    assert list(pruning.kept_at) == [0, 2]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), exact(prompts, pruning, new), **CLOSE)


@pytest.mark.parametrize("name", qwen.NAMES)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_every_pruning_layer_with_deepstack_before_and_behind_it(name: str, layer: int) -> None:
    """Features are added behind decoder layers 0, 1 and 2."""
    prompts = batch(name)
    compacted = layer == 2
    with prune_visual_tokens(prompts.model, "fastv", KEEP, layer=layer, compact_cache=compacted) as pruning:
        out, new = generate(prompts, 3)
    assert list(pruning.kept_at) == [layer]
    want = exact(prompts, pruning, new, compacted)
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)


@pytest.mark.parametrize("method", ["divprune", "coast"])
@pytest.mark.parametrize("name", qwen.NAMES)
def test_decoding_by_hand(name: str, method: str) -> None:
    """The model then adds rope_deltas to the length of a cache, which pruning has shortened."""
    prompts = batch(name)
    inputs = prompts.inputs
    new = torch.tensor([[17, 40], [33, 58]])
    mask = inputs["attention_mask"]
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, KEEP) as pruning:
        out = prompts.model(**inputs, use_cache=True)
        steps = [out.logits[:, -1]]
        for at in range(2):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            out = prompts.model(input_ids=new[:, at : at + 1], attention_mask=mask, past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    more = torch.cat([new, new[:, :1]], 1)
    positions = positions_by_deltas(prompts, 2)
    want = exact(prompts, pruning, more, position_ids=positions)
    torch.testing.assert_close(torch.stack(steps, 1).double(), want, **CLOSE)


def positions_by_deltas(prompts: Prompts, new: int) -> Tensor:
    """[3, B, L + new]: those of the prompt, and on from the largest."""
    given = {n: t for n, t in prompts.inputs.items() if not n.startswith("pixel")}
    positions, deltas = prompts.model.model.get_rope_index(**given)
    lengths = prompts.inputs["attention_mask"].sum(1, keepdim=True)
    behind = lengths + deltas + torch.arange(new)
    return torch.cat([positions, behind.expand(3, -1, -1)], 2)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_video_whose_positions_run_ahead_of_the_text(by_hand: bool) -> None:
    """Seconds stretch Qwen2.5-VL's positions in time; generate and the model's own count then differ."""
    prompts = qwen.prompts(model("qwen2_5_vl"), [[3, ("video", (3, 4, 8)), 4]])
    prompts.inputs["second_per_grid_ts"] = torch.tensor([6.0])
    with torch.no_grad(), prune_visual_tokens(prompts.model, "zspaprune", 7) as pruning:
        if not by_hand:
            out, new = generate(prompts, 3)
            got, positions = torch.stack(out.logits, 1), None
        else:
            new = torch.tensor([[17, 40, 0]])
            positions = positions_by_deltas(prompts, 2)
            out = prompts.model(**prompts.inputs, use_cache=True)
            first = out.logits[:, -1:]
            cache = out.past_key_values
            got = torch.cat(
                [first] + [prompts.model(input_ids=new[:, i : i + 1], past_key_values=cache).logits for i in (0, 1)], 1
            )
    torch.testing.assert_close(got.double(), exact(prompts, pruning, new, position_ids=positions), **CLOSE)


@pytest.mark.parametrize("method", ["adafv", "coast"])
@pytest.mark.parametrize("name", qwen.NAMES)
def test_beam_search(name: str, method: str) -> None:
    """Beams of a sample share its kept tokens, and follow the logits of their own words."""
    prompts = images(name)
    beams, steps = 3, 5
    with prune_visual_tokens(prompts.model, method, KEEP) as pruning, tower_calls(prompts) as calls:
        out, new = generate(prompts, steps, num_beams=beams)
    assert len(calls) == 1
    per_beam = {layer: kept.unflatten(0, (2, beams)) for layer, kept in pruning.kept_at.items()}
    assert all(torch.equal(kept[:, i], kept[:, 0]) for kept in per_beam.values() for i in range(beams))
    drops = [oracle.Drop(layer, oracle.dropped_columns(prompts, kept[:, 0])) for layer, kept in per_beam.items()]
    start = prompts.inputs["input_ids"].shape[1]
    want = oracle.logits(prompts, drops, new[:, :-1])[:, start - 1 :]
    rows = out.beam_indices[:, :steps]
    got = torch.stack([logits[rows[:, step]] for step, logits in enumerate(out.logits)], 1)
    torch.testing.assert_close(got.double(), want, **CLOSE)


@pytest.mark.parametrize("name", qwen.NAMES)
def test_sampling(name: str) -> None:
    prompts = images(name)
    with prune_visual_tokens(prompts.model, "adafv", KEEP) as pruning:
        out, new = generate(prompts, 4, do_sample=True)
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), exact(prompts, pruning, new), **CLOSE)
