"""AdaFV against a transcription of its equations."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import (
    Prompt,
    assert_close,
    assert_selected,
    batch,
    decided,
    over_dtypes,
    prompt,
    ragged,
    widest,
)
from tokenprune_kernels.methods import adafv


def _expected(p: Prompt, k: int, **options):
    return transcriptions.adafv(*p.numpy("text", "features", "saliency"), k, **options)


def _kept(p: Prompt, k: int, **options):
    return adafv(p.text[None], p.features[None], p.saliency[None], k, **options)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 7, 16, 29, 30, 35])
def test_selects_what_the_equations_say(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k, temperature=10.0))
    kept = _kept(p, k, temperature=10.0, backend=backend)
    assert_selected(kept, [expected["indices"]])
    assert kept.details["num_text"].tolist() == [expected["num_text"]]
    assert_close(kept.details["text"][0], expected["text"])


@over_backends
@pytest.mark.parametrize("options", [{}, {"floor": 0.0}, {"floor": 0.4}, {"temperature": 3.0}], ids=str)
def test_options(options, backend):
    p, expected = decided(lambda seed: prompt(seed, widest(backend)), lambda p: _expected(p, 14, **options))
    kept = _kept(p, 14, **options, backend=backend)
    assert_selected(kept, [expected["indices"]])
    assert kept.details["num_text"].tolist() == [expected["num_text"]]


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 20, 40])
def test_padding_changes_nothing(k, dtype, backend):
    prompts, expected = decided(
        lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k, temperature=10.0) for p in ps]
    )
    b = batch(prompts)
    kept = adafv(
        b.text, b.features, b.saliency, k, text_mask=b.text_mask, mask=b.mask, temperature=10.0, backend=backend
    )
    assert_selected(kept, [e["indices"] for e in expected])
    assert kept.details["num_text"].tolist() == [e["num_text"] for e in expected]


@over_backends
def test_identical_lists_are_split_in_the_middle(backend):
    """Prefix sums are concave, so that the product of equal ones is largest at R / 2."""
    dtype = widest(backend)
    visual = torch.randn(1, 24, 8, dtype=dtype)
    text = torch.randn(1, 3, 8, dtype=dtype)
    saliency = adafv(text, visual, torch.zeros(1, 24, dtype=dtype), 0, temperature=2.0).details["text"]
    kept = adafv(text, visual, saliency, 12, floor=0.0, temperature=2.0, backend=backend)
    assert kept.details["num_text"].tolist() == [6]
    # Both halves name the same six tokens; the freed slots go to the next six of the one ranking there is.
    assert kept.indices.tolist() == [saliency[0].argsort(descending=True)[:12].sort().values.tolist()]


@over_backends
@pytest.mark.parametrize("k", [8, 9])
def test_a_floor_of_one_half_is_a_fixed_mixture(k, backend):
    p, expected = decided(lambda seed: prompt(seed, torch.float32), lambda p: _expected(p, k, floor=0.5))
    kept = _kept(p, k, floor=0.5, backend=backend)
    assert kept.details["num_text"].tolist() == [k // 2]  # an odd slot goes to vision: r* = 0 is the first maximum
    assert_selected(kept, [expected["indices"]])


def test_rejects_a_saliency_of_the_wrong_length():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match="adafv: saliency must have shape"):
        adafv(p.text[None], p.features[None], p.saliency[None, :-1], 4)
