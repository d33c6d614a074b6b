"""Methods that merge what they drop: the kept tokens' rows are replaced, and the model goes on with those."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.transformers.test_llava import BATCHES, sample_alone
from tests.transformers.vlm.checks import CLOSE
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
