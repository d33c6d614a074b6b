"""DivPrune against its transcription, and the distribution of the random choice."""

import pytest
import torch

from testing.cases import interpreted, over_backends
from tests.methods import transcriptions
from tests.methods.inputs import (
    assert_selected,
    batch,
    decided,
    over_dtypes,
    prompt,
    ragged,
)
from tokenprune_kernels.methods import divprune, random


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 9, 30, 33])
def test_divprune(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: transcriptions.max_min(*p.numpy("features"), k))
    kept = divprune(p.features[None], k, backend=backend)
    assert [i for i in kept.details["order"][0].tolist() if i >= 0] == expected
    assert_selected(kept, [expected])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 8, 20, 40])
def test_divprune_padding_changes_nothing(k, dtype, backend):
    prompts, expected = decided(
        lambda seed: ragged(seed, dtype), lambda ps: [transcriptions.max_min(*p.numpy("features"), k) for p in ps]
    )
    b = batch(prompts)
    assert_selected(divprune(b.features, k, mask=b.mask, backend=backend), expected)


@over_backends
def test_random_is_uniform(backend):
    """4000 draws of 3 from 10: every token near 1200 times, every pair near 267 times (five standard deviations)."""
    draws = 500 if interpreted(backend) else 4000
    kept = random(10, 3, torch.Generator().manual_seed(1), batch=draws, backend=backend)
    assert kept.counts.tolist() == [3] * draws
    hit = torch.zeros(draws, 10).scatter(1, kept.indices, 1.0)
    assert hit.sum(1).eq(3).all()  # without replacement
    together = hit.T @ hit
    assert (together.diagonal() - 0.3 * draws).abs().max() < 5 * (draws * 0.3 * 0.7) ** 0.5
    pairs = together[~torch.eye(10, dtype=torch.bool)]
    assert (pairs - draws / 15).abs().max() < 5 * (draws / 15) ** 0.5


@over_backends
def test_random_takes_real_tokens_only(backend):
    mask = torch.rand(50, 12) < 0.4
    kept = random(12, 5, torch.Generator().manual_seed(2), mask=mask, backend=backend)
    assert kept.counts.tolist() == mask.sum(1).clamp(max=5).tolist()
    assert all(mask[b, i] for b, row in enumerate(kept.indices.tolist()) for i in row if i >= 0)


def test_random_follows_its_generator():
    draws = [random(100, 10, torch.Generator().manual_seed(seed)).indices.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_random_rejects_a_mask_of_the_wrong_length():
    with pytest.raises(ValueError, match="random: mask must have shape"):
        random(10, 3, mask=torch.ones(2, 9, dtype=torch.bool))


def test_random_names_a_mask_that_is_none():
    with pytest.raises(TypeError, match=r"^random: mask must be a tensor or None, got list; type torch\.as_tensor"):
        random(2, 1, mask=[[True, False]])
    with pytest.raises(ValueError, match=r"^random: mask must have shape \[B, V\], got \[2\]; type mask\.unsqueeze"):
        random(2, 1, mask=torch.ones(2, dtype=torch.bool))
