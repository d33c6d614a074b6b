"""Methods that merge what they drop: the kept tokens' rows are replaced, and the model goes on with those."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.transformers.test_llava import BATCHES, sample_alone
from tests.transformers.vlm.checks import CLOSE, assert_decoded_like_the_oracle, drops_of, generate
from tests.transformers.vlm.models import llava
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.methods import Selection


def first_and_changed(features: Tensor, present: Tensor, k: int) -> Selection:
    """The first k tokens, each with a row that no token has."""
    indices = torch.arange(k).expand(len(features), -1)
    return Selection(indices, present.sum(1).clamp_max(k), {}, merged=1 - 2 * features[:, :k])


def by_hand(model: Any, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
    """The logits behind one sample's prompt, whose embeddings are put together here: changed rows of these visual
    tokens only."""
    ids = inputs["input_ids"]
    assert len(ids) == 1
    embeddings = model.get_input_embeddings()(ids)[0]
    is_visual = ids[0] == model.config.image_token_id
    visual = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    stays = ~is_visual
    stays[is_visual.nonzero().flatten()[kept]] = True
    embeddings[is_visual.nonzero().flatten()[kept]] = 1 - 2 * visual[kept]
    logits: Tensor = model(
        inputs_embeds=embeddings[stays].unsqueeze(0), position_ids=stays.nonzero().flatten().unsqueeze(0)
    ).logits
    return logits[0, -1]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("keep", [9, 0.3])
@torch.no_grad()
def test_the_model_goes_on_with_the_merged_rows(batch: str, keep: float) -> None:
    prompts = llava(BATCHES[batch][0], ragged=BATCHES[batch][1])
    with prune_visual_tokens(prompts.model, first_and_changed, keep) as pruning:
        got = prompts.model(**prompts.inputs).logits[:, -1]
    assert pruning.kept is not None
    for b in range(len(got)):
        kept = torch.arange(int((pruning.kept[b] >= 0).sum()))
        want = by_hand(prompts.model, sample_alone(prompts, b), kept)
        torch.testing.assert_close(got[b], want, **CLOSE)


@torch.no_grad()
def test_visionzip_merges_in_front_of_the_language_model() -> None:
    """Its rows are those of the function on what the model has there, and the dropped tokens are not lost."""
    prompts, seen = llava(1), []

    def spied(features: Tensor, saliency: Tensor, k: int, *, mask: Tensor | None = None) -> Selection:
        seen.append(methods.visionzip(features, saliency, k, mask=mask))
        return seen[-1]

    with prune_visual_tokens(prompts.model, "visionzip", 12, positions="original"):
        got = prompts.model(**prompts.inputs).logits[:, -1]
    with prune_visual_tokens(prompts.model, spied, 12, positions="original"):
        assert torch.equal(prompts.model(**prompts.inputs).logits[:, -1], got)
    (chosen,) = seen
    with prune_visual_tokens(prompts.model, lambda features, k: chosen._replace(merged=None), 12):
        assert not torch.equal(prompts.model(**prompts.inputs).logits[:, -1], got)


@torch.no_grad()
def test_rows_of_another_shape_are_refused() -> None:
    prompts = llava(1)

    def narrow(features: Tensor, present: Tensor, k: int) -> Selection:
        chosen = first_and_changed(features, present, k)
        return chosen._replace(merged=features[:, :k, :-1])

    with (
        prune_visual_tokens(prompts.model, narrow, 9),
        pytest.raises(ValueError, match=r"merged of narrow must have shape \[B, k, C\] = \[1, 9, "),
    ):
        prompts.model(**prompts.inputs)


# --- calibrated attention ---------------------------------------------------------------------------------------------

SIZES = torch.tensor([1.0, 7.0, 2.0, 30.0, 1.0])


def first_with_sizes(features: Tensor, present: Tensor, k: int) -> Selection:
    chosen = first_and_changed(features, present, k)
    return chosen._replace(sizes=SIZES[:k].to(features.dtype).expand(len(features), -1))


def calibrated(model: Any, inputs: dict[str, Tensor], sizes: Tensor, new: Tensor) -> Tensor:
    """In float64, without a cache: the logits that each of the new tokens of one sample was chosen by. The first
    visual tokens are changed and stand for so many each."""
    exact = copy.deepcopy(model).double()
    ids = torch.cat([inputs["input_ids"][0], new[:-1]])
    embeddings = exact.get_input_embeddings()(ids)
    visual = torch.cat(list(exact.model.get_image_features(inputs["pixel_values"].double()).pooler_output))
    kept = (ids == model.config.image_token_id).nonzero().flatten()[: len(sizes)]
    embeddings[kept] = 1 - 2 * visual[: len(sizes)]
    stays = ids != model.config.image_token_id
    stays[kept] = True
    size = torch.ones(len(ids), dtype=torch.float64)
    size[kept] = sizes.double()

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        weight = (query @ key.mT * scaling).exp().tril() * size[stays]
        return (weight / weight.sum(-1, keepdim=True) @ value).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("calibrated_float64", attend)
    exact.model.language_model.config._attn_implementation = "calibrated_float64"
    position = stays.nonzero().flatten().unsqueeze(0)
    logits: Tensor = exact(inputs_embeds=embeddings[stays].unsqueeze(0), position_ids=position).logits
    return logits[0, -len(new) :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [[5, 5, 5], [3, 5, 1]])
@torch.no_grad()
def test_a_merged_key_weighs_as_much_as_all_it_stands_for(attention: str, keep: list[int]) -> None:
    prompts = llava(3, ragged=True, attention=attention)
    with prune_visual_tokens(prompts.model, first_with_sizes, keep, per="sample", calibrate=True):
        out = generate(prompts.model, prompts.inputs, 32)
    new = out.sequences[:, prompts.inputs["input_ids"].shape[1] :]
    for b, k in enumerate(keep):
        want = calibrated(prompts.model, sample_alone(prompts, b), SIZES[:k], new[b])
        torch.testing.assert_close(torch.stack(out.logits, 1)[b].double(), want, **CLOSE)
        if k > 1:  # and it makes a difference
            assert (
                want - calibrated(prompts.model, sample_alone(prompts, b), torch.ones(k), new[b])
            ).abs().max() > 1e-4


@pytest.mark.parametrize("compact", [False, True])
@torch.no_grad()
def test_a_merge_inside_the_model_is_calibrated_from_its_layer_on(compact: bool) -> None:
    """Against the float64 path, whose attention is told the sizes from layer 2 on."""
    prompts = llava(2, ragged=True)

    def largest(features: Tensor, present: Tensor, k: int) -> Selection:
        """Five tokens that stand for several, without a row of their own."""
        return first_with_sizes(features, present, k)._replace(merged=None)

    with prune_visual_tokens(prompts.model, largest, 5, layer=2, calibrate=True, compact_cache=compact) as pruning:
        out = generate(prompts.model, prompts.inputs, 32)
    drops = drops_of(prompts, pruning, 2, compact)
    is_visual = prompts.inputs["input_ids"] == prompts.visual
    bias = torch.zeros(is_visual.shape, dtype=torch.float64)
    bias[is_visual & ~drops[0].columns] = SIZES.double().log().repeat(2)
    calibrated = [replace(drop, bias=bias) for drop in drops]
    assert_decoded_like_the_oracle(prompts, calibrated, out)
    with pytest.raises(AssertionError):  # and it makes a difference
        assert_decoded_like_the_oracle(prompts, drops, out)


@torch.no_grad()
def test_visionzip_can_be_calibrated_per_image() -> None:
    prompts = llava(2, ragged=True, images=2)
    logits = []
    for calibrate in (False, True):
        with prune_visual_tokens(prompts.model, "visionzip", 12, per="image", calibrate=calibrate):
            logits.append(prompts.model(**prompts.inputs).logits[:, -1])
    assert not torch.equal(*logits)


@torch.no_grad()
def test_what_cannot_be_calibrated_is_refused() -> None:
    prompts = llava(1)
    for name in ("flex_attention", "flash_attention_2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompts.model.config.text_config, "_attn_implementation", name)
            with pytest.raises(NotImplementedError, match=f"which sdpa and eager take, got '{name}'"):
                prune_visual_tokens(prompts.model, "visionzip", 9, calibrate=True)
    with pytest.raises(TypeError, match="calibrate must be a bool, got 1"):
        prune_visual_tokens(prompts.model, "visionzip", 9, calibrate=1)  # type: ignore[arg-type]
    with (
        prune_visual_tokens(prompts.model, "divprune", 9, calibrate=True),
        pytest.raises(ValueError, match="needs the sizes of merged tokens in a Selection, and divprune returned none"),
    ):
        prompts.model(**prompts.inputs)
    with (
        prune_visual_tokens(prompts.model, first_with_sizes, {1: 5, 2: 3}, calibrate=True),
        pytest.raises(NotImplementedError, match="first_with_sizes merges a second time"),
    ):
        prompts.model(**prompts.inputs)
