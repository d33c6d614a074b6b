"""Prompts of embeddings: the visual columns are those of input_ids, or of the placeholders that the model looks for."""

import pytest
import torch
from torch import Tensor

from tests.transformers.vlm import models_qwen as qwen
from tests.transformers.vlm.checks import LAYER, generate, options_of, over_four
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels.integrations.transformers import prune_visual_tokens


def embedded(prompts: Prompts, *, images: bool) -> dict[str, Tensor]:
    """The inputs with embeddings in place of ids; images: their features are in place already."""
    ids = prompts.inputs["input_ids"]
    inputs = {n: t for n, t in prompts.inputs.items() if n != "input_ids" and not (images and n.startswith("pixel"))}
    with torch.no_grad():
        embeds = prompts.model.get_input_embeddings()(ids)
        if images:
            features = torch.cat(prompts.model.get_image_features(prompts.inputs["pixel_values"]).pooler_output)
            embeds = embeds.masked_scatter((ids == prompts.visual).unsqueeze(-1), features)
    return {**inputs, "inputs_embeds": embeds}


@pytest.mark.parametrize("method", ["coast", "divprune"])
def test_generate_with_features_in_place_and_the_ids_beside_them(method: str) -> None:
    prompts = llava(2, ragged=True)
    given = {**embedded(prompts, images=True), "input_ids": prompts.inputs["input_ids"]}
    for more in ({}, {"num_beams": 2}):
        with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
            want = generate(prompts.model, prompts.inputs, 6, **more)
            kept = pruning.kept
            out = generate(prompts.model, given, 6, **more)
        assert torch.equal(pruning.kept, kept)
        assert torch.equal(out.sequences, want.sequences)
        assert torch.equal(torch.stack(out.logits), torch.stack(want.logits))


@over_four
def test_placeholders_among_the_embeddings_are_found_as_the_model_finds_them(method: str) -> None:
    prompts = llava(2, ragged=True)
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        want = prompts.model(**prompts.inputs).logits
        kept = pruning.kept
        got = prompts.model(**embedded(prompts, images=False)).logits
    assert torch.equal(pruning.kept, kept)
    assert torch.equal(got, want)


def test_qwen_with_the_ids_beside_its_embeddings() -> None:
    prompts = qwen.prompts(qwen.model("qwen2_5_vl"), [[3, (1, 8, 12), 2, (1, 4, 8), 5], [2, (1, 8, 8), 4]])
    given = {**embedded(prompts, images=False), "input_ids": prompts.inputs["input_ids"]}
    more = {"suppress_tokens": qwen.SPECIAL}
    with prune_visual_tokens(prompts.model, "adaptprune", 0.4, layer=LAYER) as pruning:
        want = generate(prompts.model, prompts.inputs, 5, **more)
        kept = pruning.kept
        out = generate(prompts.model, given, 5, **more)
    assert torch.equal(pruning.kept, kept)
    assert torch.equal(out.sequences, want.sequences)


def test_features_in_place_without_ids_are_refused() -> None:
    prompts = llava(2)
    given = embedded(prompts, images=True)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER) as pruning:
        with pytest.raises(NotImplementedError, match="inputs_embeds whose images are in place already tell no visual"):
            prompts.model(**given)
        with pytest.raises(NotImplementedError, match="inputs_embeds whose images are in place already tell no visual"):
            generate(prompts.model, given, 3)
        assert pruning.kept is None
