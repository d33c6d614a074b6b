"""Where pruning inside a model usually goes wrong: prompts, and the ways to generate."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import (
    CLOSE,
    LAYER,
    assert_decoded_like_the_oracle,
    drops_of,
    generate,
    options_of,
    over_four,
    over_four_and_compact,
)
from tests.transformers.vlm.models import IMAGE, Prompts, left_padded, llava, text
from tokenprune_kernels.integrations.transformers import prune_visual_tokens


def with_samples(samples: list[list[int]], images: int) -> Prompts:
    prompts = llava()
    pixels = torch.randn(images, 3, 24, 24, generator=torch.Generator().manual_seed(9))
    return Prompts(prompts.model, {**left_padded(samples), "pixel_values": pixels}, IMAGE)


def unequal() -> Prompts:
    """Two images with text between them, none, and one behind a long text."""
    draw, image = torch.Generator().manual_seed(2), [IMAGE] * 36
    return with_samples(
        [
            [*text(2, draw), *image, *text(5, draw), *image, *text(3, draw)],
            text(9, draw),
            [*text(12, draw), *image, *text(6, draw)],
        ],
        3,
    )


def forward(prompts: Prompts, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = prompts.model(**{**prompts.inputs, **more}).logits
    return logits


def assert_last_row(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got[:, -1].double(), want[:, -1], **CLOSE)


# --- prompts ----------------------------------------------------------------------------------------------------------


@over_four
def test_left_padding_and_unequal_text(method: str) -> None:
    prompts = llava(4, ragged=True)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 4)
    assert pruning.stats["after"] == [9] * 4
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, LAYER), out, renumber=method == "adafv")


@over_four_and_compact
@pytest.mark.parametrize("keep", [10, 0.25])
def test_different_numbers_of_images_in_a_batch_and_none(method: str, compact: bool, keep: float) -> None:
    prompts = unequal()
    with prune_visual_tokens(prompts.model, method, keep, compact_cache=compact, **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 5)
    counts = [10, 0, 10] if keep == 10 else [18, 0, 9]
    assert pruning.stats["before"] == [72, 0, 36]
    assert pruning.stats["after"] == counts
    assert pruning.kept is not None
    assert (pruning.kept >= 0).sum(1).tolist() == counts
    assert all(
        row[count:] == [-1] * (len(row) - count) for row, count in zip(pruning.kept.tolist(), counts, strict=True)
    )
    drops = drops_of(prompts, pruning, LAYER, compact)
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=method == "adafv")


@over_four
def test_several_images_and_text_between_them(method: str) -> None:
    prompts = llava(2, ragged=True, images=3)
    with prune_visual_tokens(prompts.model, method, 0.2, **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 4)
    assert pruning.stats["before"] == [108, 108]
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, LAYER), out, renumber=method == "adafv")


@over_four
def test_right_padding_keeps_and_answers_as_left_padding(method: str) -> None:
    left = llava(3, ragged=True)
    ids, mask = left.inputs["input_ids"], left.inputs["attention_mask"].bool()
    right = {"input_ids": torch.zeros_like(ids), "attention_mask": mask.flip(1).long()}
    right["input_ids"][mask.flip(1)] = ids[mask]
    with prune_visual_tokens(left.model, method, 9, **options_of(method)) as pruning:
        want = forward(left)
        kept = pruning.kept
        got = forward(left, **right)
    assert kept is not None
    assert pruning.kept is not None
    assert torch.equal(pruning.kept, kept)
    # Every sample ends at the right edge after pruning.
    torch.testing.assert_close(got[:, -1], want[:, -1], **CLOSE)


@pytest.mark.parametrize("method", ["coast", "fastv", "divprune"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_may_end_with_a_image(method: str, side: str) -> None:
    draw, image = torch.Generator().manual_seed(4), [IMAGE] * 36
    prompts = with_samples([[*text(7, draw), *image], [*text(3, draw), *image, *text(2, draw)]], 2)
    alone = []
    for b in range(2):
        real = prompts.inputs["attention_mask"][b].bool()
        alone.append({"input_ids": prompts.inputs["input_ids"][b, real][None], "attention_mask": real[real][None]})
    if side == "right":
        for name, t in (("input_ids", torch.int64), ("attention_mask", torch.int64)):
            rows = [a[name][0].to(t) for a in alone]
            prompts.inputs[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        together, kept = forward(prompts), pruning.kept
        assert kept is not None
        for b in range(2):
            got = forward(prompts, **alone[b], pixel_values=prompts.inputs["pixel_values"][b : b + 1])
            assert torch.equal(pruning.kept, kept[b : b + 1])
            torch.testing.assert_close(together[b : b + 1, -1], got[:, -1], **CLOSE)


@pytest.mark.parametrize("batch", [1, 2])
@over_four
def test_without_a_mask_and_with_explicit_positions(method: str, batch: int) -> None:
    prompts = llava(batch)
    length = prompts.inputs["input_ids"].shape[1]
    for cached in (True, False):
        for positions in (None, torch.arange(5, 5 + length).expand(batch, -1), torch.arange(length)[None]):
            with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
                got = forward(prompts, attention_mask=None, position_ids=positions, use_cache=cached)
            drops = drops_of(prompts, pruning, LAYER)
            assert_last_row(got, oracle.logits(prompts, drops, **_numbering(prompts, drops, method, positions)))


def _numbering(prompts: Prompts, drops: list[Any], method: str, positions: Tensor | None) -> dict[str, Any]:
    if method == "adafv":
        return {"renumber": True}
    return {} if positions is None else {"position_ids": positions}


@pytest.mark.parametrize("method", ["coast", "sts", "divprune"])
def test_positions_with_gaps_are_kept_as_they_are(method: str) -> None:
    prompts = llava(2)
    positions = 3 * torch.arange(prompts.inputs["input_ids"].shape[1]).expand(2, -1)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        got = forward(prompts, position_ids=positions)
        drops = drops_of(prompts, pruning, LAYER)
        # Without a mask, transformers takes a gap for the border between packed sequences.
        with pytest.raises(NotImplementedError, match="attention_mask"):
            forward(prompts, position_ids=positions, attention_mask=None)
    assert_last_row(got, oracle.logits(prompts, drops, position_ids=positions))


@over_four
def test_text_alone_is_untouched_inside_the_block(method: str) -> None:
    prompts = llava()
    ids = torch.tensor([text(9, torch.Generator().manual_seed(1))])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    square = torch.ones(9, 9).tril().bool()[None, None]
    plain = generate(prompts.model, inputs, 4)
    loss = prompts.model(**inputs, labels=ids).loss
    with_square = prompts.model(input_ids=ids, attention_mask=square).logits
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        out = generate(prompts.model, inputs, 4)
        static = generate(prompts.model, inputs, 4, cache_implementation="static", disable_compile=True)
        assert torch.equal(prompts.model(**inputs, labels=ids).loss, loss)
        assert torch.equal(prompts.model(input_ids=ids, attention_mask=square).logits, with_square)
    assert pruning.kept is None
    assert pruning.stats["prefills"] == 0
    for got, want in zip(out.logits, plain.logits, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(static.sequences, plain.sequences)


@over_four
def test_every_prefill_in_a_block_is_pruned_by_itself(method: str) -> None:
    prompts, other = llava(), llava(2, ragged=True, images=2)
    results = []
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as block:
        for inputs in (prompts.inputs, other.inputs, prompts.inputs):
            results.append((generate(prompts.model, inputs, 3), block.kept))
        assert block.stats["prefills"] == 3
    for inputs, (out, kept) in zip((prompts.inputs, other.inputs, prompts.inputs), results, strict=True):
        with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as alone:
            want = generate(prompts.model, inputs, 3)
        assert torch.equal(out.sequences, want.sequences)
        assert alone.kept is not None
        assert torch.equal(kept, alone.kept)


# --- ways to generate -------------------------------------------------------------------------------------------------


@over_four_and_compact
def test_beam_search_scores_are_those_of_the_float64_path(method: str, compact: bool) -> None:
    prompts = llava(2, ragged=True)
    length = prompts.inputs["input_ids"].shape[1]
    with prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)) as pruning:
        out = generate(
            prompts.model,
            prompts.inputs,
            6,
            num_beams=3,
            num_return_sequences=2,
            output_scores=True,
            length_penalty=1.0,
        )
    kept = pruning.kept
    assert kept is not None
    assert kept.shape == (6, 9)
    repeated = Prompts(prompts.model, {n: t.repeat_interleave(2, 0) for n, t in prompts.inputs.items()}, IMAGE)
    drops = []
    for drop in drops_of(_beams(prompts, 3), pruning, LAYER, compact):
        assert torch.equal(drop.columns[0::3], drop.columns[2::3])  # every beam of a sample keeps the same tokens
        drops.append(oracle.Drop(drop.layer, drop.columns[0::3].repeat_interleave(2, 0), compact))
    new = out.sequences[:, length:]
    more = {"renumber": method == "adafv"}
    exact = oracle.logits(repeated, drops, new[:, :-1], **more)[:, length - 1 :].log_softmax(-1)
    score = exact.gather(2, new.unsqueeze(2)).sum((1, 2)) / 6
    torch.testing.assert_close(out.sequences_scores.double(), score, rtol=0, atol=2e-6)


def _beams(prompts: Prompts, beams: int) -> Prompts:
    return Prompts(prompts.model, {n: t.repeat_interleave(beams, 0) for n, t in prompts.inputs.items()}, IMAGE)


@over_four
def test_sampling_and_several_answers(method: str) -> None:
    prompts = llava(2, ragged=True)
    torch.manual_seed(3)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 6, do_sample=True, num_return_sequences=3)
    repeated = _beams(prompts, 3)
    assert len(out.sequences.unique(dim=0)) > 2
    assert_decoded_like_the_oracle(repeated, drops_of(repeated, pruning, LAYER), out, renumber=method == "adafv")


@pytest.mark.parametrize("method", ["coast", "adafv"])
def test_the_vision_tower_runs_once(method: str) -> None:
    prompts = llava(2, ragged=True)
    runs: list[int] = []
    handle = prompts.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    for more in ({}, {"num_beams": 2}):
        runs.clear()
        with prune_visual_tokens(prompts.model, method, 9, **options_of(method)):
            generate(prompts.model, prompts.inputs, 4, **more)
        assert len(runs) == 1
    handle.remove()


def test_features_encoded_beforehand_are_pruned_too() -> None:
    prompts = llava(2, ragged=True)
    if "mm_encoder_outputs" not in inspect.signature(prompts.model.forward).parameters:
        pytest.skip("this transformers takes no encoded features")
    inputs = {n: t for n, t in prompts.inputs.items() if n != "pixel_values"}
    with torch.no_grad():
        features = prompts.model.get_image_features(prompts.inputs["pixel_values"], return_dict=True)
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        want = generate(prompts.model, prompts.inputs, 3)
        out = generate(prompts.model, inputs, 3, mm_encoder_outputs={"image": features})
    assert torch.equal(out.sequences, want.sequences)
    with prune_visual_tokens(prompts.model, "adafv", 9), pytest.raises(RuntimeError, match="vision tower to run"):
        generate(prompts.model, inputs, 3, mm_encoder_outputs={"image": features})


@over_four
@pytest.mark.parametrize("through", ["keyword", "config", "model"])
def test_a_prefill_in_chunks_is_refused_by_name(method: str, through: str) -> None:
    """The image would come in one chunk, and the question about it in the next."""
    prompts = llava(2, ragged=True)
    length = prompts.inputs["input_ids"].shape[1]
    ids = torch.tensor([text(9, torch.Generator().manual_seed(1))])
    plain = generate(prompts.model, {"input_ids": ids}, 3)

    def chunked(inputs: dict[str, Tensor], size: int) -> Any:
        own = prompts.model.generation_config
        if through == "keyword":
            return generate(prompts.model, inputs, 3, prefill_chunk_size=size)
        config = own if through == "model" else copy.deepcopy(own)
        config.prefill_chunk_size = size
        try:
            return generate(prompts.model, inputs, 3, **({"generation_config": config} if through == "config" else {}))
        finally:
            own.prefill_chunk_size = None

    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        for size in (length - 1, length // 2, 4):
            with pytest.raises(NotImplementedError, match=f"prefill_chunk_size={size}"):
                chunked(prompts.inputs, size)
        assert pruning.kept is None
        assert torch.equal(chunked({"input_ids": ids}, 4).sequences, plain.sequences)  # text alone
