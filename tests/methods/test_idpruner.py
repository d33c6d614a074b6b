"""IDPruner against a transcription of its two steps."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_close, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tokenprune_kernels.methods import idpruner


def _expected(p: Prompt, k: int, **options):
    return transcriptions.idpruner(*p.numpy("features", "saliency"), k, **options)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 9, 30, 33])
@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_selects_what_the_steps_say(k, weight, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k, weight=weight))
    kept = idpruner(p.features[None], p.saliency[None], k, weight=weight, backend=backend)
    assert_selected(kept, [expected["order"]])
    assert [i for i in kept.details["order"][0].tolist() if i >= 0] == expected["order"]
    assert_close(kept.details["importance"][0], expected["importance"])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 14])
def test_padding_changes_nothing(k, dtype, backend):
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = idpruner(b.features, b.saliency, k, mask=b.mask, backend=backend)
    assert_selected(kept, [e["order"] for e in expected])


@over_backends
def test_equal_importance_leaves_diversity_and_nan_comes_last(backend):
    """The first index, then what is least alike; a token whose importance is no number does not set the range."""
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    kept = idpruner(features, torch.full((1, 4), 3.0), 4, backend=backend)
    assert kept.details["order"].tolist() == [[0, 3, 2, 1]]
    kept = idpruner(features, torch.tensor([[torch.nan, 1.0, 2.0, 1.5]]), 4, backend=backend)
    assert kept.details["importance"][0, 1:].tolist() == pytest.approx([0.0, 1.0, 0.5], abs=1e-5)
    assert kept.details["order"][0, -1] == 0


@over_backends
def test_infinite_importance_comes_before_and_behind_the_finite(backend):
    """Nor does it set the range of the finite ones; alone, infinite ones are in the order of candidates too."""
    features = torch.eye(6)[None]
    importance = torch.tensor([[-torch.inf, 1.0, 2.0, torch.nan, torch.inf, 1.5]])
    kept = idpruner(features, importance, 6, backend=backend)
    assert kept.details["order"].tolist() == [[4, 2, 5, 1, 0, 3]]
    assert kept.details["importance"][0, [1, 2, 5]].tolist() == pytest.approx([0.0, 1.0, 0.5], abs=1e-5)
    infinite = torch.tensor([[-torch.inf, torch.inf, torch.nan, -torch.inf, torch.inf, torch.nan]])
    assert idpruner(features, infinite, 6, backend=backend).details["order"].tolist() == [[1, 4, 0, 3, 2, 5]]


def test_rejects_what_does_not_fit():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match=r"idpruner: importance must have shape \[B, V, \.\.\.\] = \[1, 30"):
        idpruner(p.features[None], p.saliency[None, :7], 4)
    for weight in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"idpruner: weight must lie between 0 and 1, got {weight}"):
            idpruner(p.features[None], p.saliency[None], 4, weight=weight)
