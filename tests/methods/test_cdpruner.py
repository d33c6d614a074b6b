"""CDPruner against a transcription of its three steps, whose gains are quotients of determinants."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_close, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tokenprune_kernels.methods import cdpruner

# Below the rank, which the twelve channels of the samples bound: beyond it gains are roundings.
over_budgets = pytest.mark.parametrize("k", [0, 1, 2, 5, 9])


def _expected(p: Prompt, k: int, **options):
    return transcriptions.cdpruner(*p.numpy("features", "text"), k, **options)


@over_backends
@over_dtypes
@over_budgets
def test_selects_what_the_steps_say(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k))
    kept = cdpruner(p.features[None], p.text[None], k, backend=backend)
    assert_selected(kept, [expected["order"]])
    assert kept.details["order"][0].tolist() == expected["order"]
    for name in ("relevance", "quality", "gains"):
        assert_close(kept.details[name][0], expected[name])


@over_backends
@over_dtypes
@over_budgets
def test_relevance_of_clip_has_a_minus(k, dtype, backend):
    """Patches and text in a space of their own, of another width than the features."""

    def make(seed):
        draw = torch.Generator().manual_seed(seed + 7)
        image, text = torch.randn(30, 20, generator=draw), torch.randn(3, 20, generator=draw)
        return prompt(seed, dtype), image.to(dtype), text.to(dtype)

    (p, image, text), expected = decided(
        make,
        lambda made: transcriptions.cdpruner(
            *made[0].numpy("features"), made[2].double().numpy(), k, image=made[1].double().numpy()
        ),
    )
    kept = cdpruner(p.features[None], text[None], k, image_embeddings=image[None], backend=backend)
    assert kept.details["order"][0].tolist() == expected["order"]
    assert_close(kept.details["relevance"][0], expected["relevance"])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 9])
def test_padding_changes_nothing(k, dtype, backend):
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = cdpruner(b.features, b.text, k, text_mask=b.text_mask, mask=b.mask, backend=backend)
    assert_selected(kept, [e["order"] for e in expected])


@over_backends
def test_the_range_of_relevance_is_the_sample_s_or_the_batch_s(backend):
    p = [prompt(seed, torch.float32) for seed in (1, 2)]
    features, text = (torch.stack([getattr(x, name) for x in p]) for name in ("features", "text"))
    own = cdpruner(features, text, 5, backend=backend).details
    shared = cdpruner(features, text, 5, shared_range=True, backend=backend).details
    low, high = own["relevance"].amin(1, keepdim=True), own["relevance"].amax(1, keepdim=True)
    assert_close(own["quality"], (own["relevance"] - low + 1e-6) / (high - low))
    assert_close(shared["quality"], (own["relevance"] - low.min() + 1e-6) / (high.max() - low.min()))


@over_backends
def test_more_tokens_than_the_rank_are_distinct(backend):
    """The authors' code picks tokens twice there, and keeps fewer than it was asked for."""
    p = prompt(0, torch.float32)
    kept = cdpruner(p.features[None], p.text[None], 25, backend=backend)
    assert kept.counts.tolist() == [25]
    assert len(set(kept.indices[0].tolist())) == 25


@over_backends
@pytest.mark.parametrize("text", ["none", "of zeros"])
def test_without_a_question_diversity_alone_decides(text, backend):
    """All relevances are equal: a division by zero in the authors' code."""
    p = prompt(0, torch.float32)
    rows = p.text[:0] if text == "none" else torch.zeros_like(p.text)
    kept = cdpruner(torch.eye(6)[None], rows[None, :, :6], 3, backend=backend)
    assert kept.details["quality"].tolist() == [[1.0] * 6]
    assert kept.indices.tolist() == [[0, 1, 2]]


@over_backends
def test_a_token_that_is_not_finite_is_last(backend):
    p = prompt(0, torch.float32)
    features = p.features.clone()
    features[3] = torch.nan
    kept = cdpruner(features[None], p.text[None], 29, backend=backend)
    assert kept.counts.tolist() == [29]
    assert 3 not in kept.indices[0].tolist()


def test_rejects_embeddings_of_other_tokens():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match=r"cdpruner: image_embeddings must have shape \[B, V, \.\.\.\] = \[1, 30"):
        cdpruner(p.features[None], p.text[None], 4, image_embeddings=p.features[None, :7])
