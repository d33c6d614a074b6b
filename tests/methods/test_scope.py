"""SCOPE against a transcription of its two steps."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_close, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tokenprune_kernels.methods import scope


def _expected(p: Prompt, k: int, **options):
    return transcriptions.scope(*p.numpy("features", "saliency"), k, **options)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 5, 12, 20])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_selects_what_the_steps_say(k, alpha, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k, alpha=alpha))
    kept = scope(p.features[None], p.saliency[None], k, alpha=alpha, backend=backend)
    assert_selected(kept, [expected["order"]])
    assert kept.details["order"][0].tolist() == expected["order"]
    assert_close(kept.details["gains"][0], expected["gains"])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 14])
def test_padding_changes_nothing(k, dtype, backend):
    """Also at k = 14, where the second sample has twelve tokens; it neither covers nor is to be covered."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = scope(b.features, b.saliency, k, mask=b.mask, backend=backend)
    assert_selected(kept, [e["order"] for e in expected])


@over_backends
def test_the_scale_of_the_saliency_changes_no_pick(backend):
    """The sum over heads in one of the programs, the mean in the other."""
    p = prompt(0, torch.float32)
    kept = scope(p.features[None], p.saliency[None], 9, backend=backend)
    scaled = scope(p.features[None], 16 * p.saliency[None], 9, backend=backend)
    assert kept.details["order"].tolist() == scaled.details["order"].tolist()


@over_backends
def test_zero_vectors_and_zero_weights_come_last(backend):
    """A zero vector covers nothing, not even itself; nor is a token without saliency of use before the others."""
    features = torch.eye(5)[None].clone()
    features[0, 1] = 0
    kept = scope(features, torch.tensor([[0.0, 9.0, 1.0, 2.0, -3.0]]), 5, backend=backend)
    assert kept.details["order"].tolist() == [[3, 2, 0, 1, 4]]
    assert kept.details["gains"].tolist() == [[2.0, 1.0, 0.0, 0.0, 0.0]]


def test_rejects_saliency_of_other_tokens():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match=r"scope: saliency must have shape \[B, V, \.\.\.\] = \[1, 30"):
        scope(p.features[None], p.saliency[None, :7], 4)
