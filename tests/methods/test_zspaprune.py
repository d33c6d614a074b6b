"""ZSPAPrune against a transcription of its three steps."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_close, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tokenprune_kernels.methods import zspaprune


def _expected(p: Prompt, k: int, **options):
    return transcriptions.zspaprune(*p.numpy("text", "features"), k, **options)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 5, 12, 29, 30, 36])
def test_selects_what_the_steps_say(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k))
    kept = zspaprune(p.text[None], p.features[None], k, backend=backend)
    assert_selected(kept, [expected["indices"]])
    assert [i for i in kept.details["core"][0].tolist() if i >= 0] == expected["core"]
    assert [i for i in kept.details["diverse"][0].tolist() if i >= 0] == expected["diverse"]
    assert_close(kept.details["relevance"][0], expected["relevance"])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 18, 40])
def test_padding_changes_nothing(k, dtype, backend):
    """Also at k = 18, where the second sample's twelve tokens are not enough, and k = 40, where its core is short."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = zspaprune(b.text, b.features, k, text_mask=b.text_mask, mask=b.mask, backend=backend)
    assert_selected(kept, [e["indices"] for e in expected])
    assert [[i for i in row if i >= 0] for row in kept.details["core"].tolist()] == [e["core"] for e in expected]


@over_backends
def test_core_ratio_one_is_the_best_by_cosine(backend):
    p, expected = decided(
        lambda seed: prompt(seed, torch.float32),
        lambda p: transcriptions.best(_expected(p, 1, core_ratio=1.0)["relevance"], range(30), 11),
    )
    assert_selected(zspaprune(p.text[None], p.features[None], 11, core_ratio=1.0, backend=backend), [expected])


@over_backends
def test_a_core_of_one_is_farthest_point_sampling_from_the_best(backend):
    def from_best(p: Prompt) -> list[int]:
        seed = _expected(p, 1)["core"]
        return seed + transcriptions.max_min(*p.numpy("features"), 10, seed=seed)

    p, expected = decided(lambda seed: prompt(seed, torch.float32), from_best)
    kept = zspaprune(p.text[None], p.features[None], 11, core_ratio=0.0, backend=backend)
    assert [*kept.details["core"][0].tolist(), *kept.details["diverse"][0].tolist()] == expected


@over_backends
def test_padding_of_the_text_may_hold_anything(backend):
    p = prompt(0, torch.float32)
    text = torch.cat([p.text, torch.full_like(p.text[:1], torch.nan)])
    mask = torch.tensor([[True] * 4 + [False]])
    kept = zspaprune(text[None], p.features[None], 9, text_mask=mask, backend=backend)
    assert kept.indices.tolist() == zspaprune(p.text[None], p.features[None], 9, backend=backend).indices.tolist()


@over_backends
def test_without_any_text_the_first_tokens_are_the_core(backend):
    p = prompt(0, torch.float32)
    kept = zspaprune(p.text[None, :0], p.features[None], 9, backend=backend)
    assert kept.details["core"].tolist() == [list(range(5))]


def test_rejects_bad_ratios():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match="zspaprune: core_ratio must lie in"):
        zspaprune(p.text[None], p.features[None], 4, core_ratio=-0.1)
