"""MMTok against a transcription of its two steps."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_close, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tokenprune_kernels.methods import mmtok


def _expected(p: Prompt, k: int, **options):
    return transcriptions.mmtok(*p.numpy("features", "text"), k, **options)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_selects_what_the_steps_say(k, alpha, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k, alpha=alpha))
    kept = mmtok(p.features[None], p.text[None], k, alpha=alpha, backend=backend)
    assert_selected(kept, [expected["order"]])
    assert kept.details["order"][0].tolist() == expected["order"]
    assert_close(kept.details["gains"][0], expected["gains"])


@over_backends
@over_dtypes
def test_the_towers_states_say_what_is_alike(dtype, backend):
    def make(seed):
        seen = torch.randn(30, 9, generator=torch.Generator().manual_seed(seed + 5))
        return prompt(seed, dtype), seen.to(dtype)

    (p, seen), expected = decided(make, lambda made: _expected(made[0], 6, seen=made[1].double().numpy()))
    kept = mmtok(p.features[None], p.text[None], 6, image_embeddings=seen[None], backend=backend)
    assert kept.details["order"][0].tolist() == expected["order"]


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6])
def test_padding_changes_nothing(k, dtype, backend):
    """Neither of the text, whose rows differ in number, nor of the image; nor do the samples depend on each other."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = mmtok(b.features, b.text, k, text_mask=b.text_mask, mask=b.mask, backend=backend)
    assert_selected(kept, [e["order"] for e in expected])


@over_backends
def test_ties_go_to_the_lower_index_and_runs_are_equal(backend):
    kept, again = (mmtok(torch.eye(8)[None], torch.zeros(1, 2, 8), 3, backend=backend) for _ in range(2))
    assert kept.indices.tolist() == [[0, 1, 2]]
    assert torch.equal(kept.details["gains"], again.details["gains"])


@over_backends
def test_a_token_with_nan_covers_nothing_and_spoils_no_other(backend):
    p = prompt(0, torch.float32)
    p.features[4, 0] = torch.nan
    kept = mmtok(p.features[None], p.text[None], 6, backend=backend)
    assert 4 not in kept.indices
    assert bool((kept.details["gains"] > 0).all())


def test_rejects_what_does_not_fit():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match=r"mmtok: image_embeddings must have shape \[B, V, \.\.\.\] = \[1, 30"):
        mmtok(p.features[None], p.text[None], 4, image_embeddings=p.features[None, :7])
    with pytest.raises(ValueError, match=r"mmtok: text_embeddings must have shape \[B, T, C\] = \[1, T, 12\], got"):
        mmtok(p.features[None], p.text[None, :, :5], 4)
