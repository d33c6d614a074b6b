"""VisPruner against a transcription of its list, round by round."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tokenprune_kernels.methods import Selection, vispruner


def _expected(p: Prompt, k: int, **options):
    return transcriptions.vispruner(*p.numpy("features", "saliency"), k, **options)


def _assert_chosen(kept: Selection, expected: list[dict[str, list[int]]]) -> None:
    assert_selected(kept, [e["important"] + e["diverse"] for e in expected])
    for b, e in enumerate(expected):
        for name, want in e.items():
            assert [i for i in kept.details[name][b].tolist() if i >= 0] == want


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 7, 16, 29, 30, 33])
@pytest.mark.parametrize("ratio", [0.5, 0.2, 0.0])
def test_selects_what_the_rounds_leave(k, ratio, dtype, backend):
    """Of 30 tokens: up to five rounds, lists of even and odd length."""
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k, ratio=ratio))
    kept = vispruner(p.features[None], p.saliency[None], k, important_ratio=ratio, backend=backend)
    _assert_chosen(kept, [expected])


@over_backends
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_many_rounds(ratio, backend):
    """Fourteen of 120 tokens; in float64, because so many cosines are near ties in float32."""

    def make(seed: int) -> Prompt:
        features = torch.randn(120, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return prompt(seed, torch.float32, (10, 12))._replace(features=features)

    p, expected = decided(make, lambda p: _expected(p, 12, ratio=ratio, margin=1e-12))
    kept = vispruner(p.features[None], p.saliency[None], 12, important_ratio=ratio, backend=backend)
    _assert_chosen(kept, [expected])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 11, 14, 40])
def test_padding_changes_nothing(k, dtype, backend):
    """Samples whose lists need other numbers of rounds."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    _assert_chosen(vispruner(b.features, b.saliency, k, mask=b.mask, backend=backend), expected)


@over_backends
def test_equal_tokens_keep_the_order_of_the_list(backend):
    """All are alike: of the even places 0, 2, 4, ... the first eight go, then of what is left again."""
    kept = vispruner(torch.ones(1, 20, 4), torch.ones(1, 20), 4, important_ratio=0.0, backend=backend)
    want = transcriptions.vispruner(torch.ones(20, 4).numpy(), torch.ones(20).numpy(), 4, ratio=0.0)
    assert kept.indices.tolist() == [want["diverse"]]


@over_backends
@pytest.mark.parametrize("ratio", [0.5, 0.0])
def test_saliency_without_bounds_is_in_the_order_of_candidates(ratio, backend):
    """A masked token is not in the list, however little the others count; NaN comes behind -inf."""
    saliency = torch.tensor([[9.0, torch.nan, -torch.inf, -torch.inf, 2.0, 0.0]])
    real = torch.tensor([[False, True, True, True, True, True]])
    kept = vispruner(torch.eye(6)[None], saliency, 5, mask=real, important_ratio=ratio, backend=backend)
    assert kept.indices.tolist() == [[1, 2, 3, 4, 5]]
    # The list is 4, 5, 2, 3, 1: alike are those at even places, of which the first goes, and nothing else.
    kept = vispruner(torch.ones(1, 6, 2), saliency, 4, mask=real, important_ratio=0.0, backend=backend)
    assert kept.indices.tolist() == [[1, 2, 3, 5]]


@over_backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_with_nan_goes_first_and_drives_out_no_other(value, backend):
    """At an even place of the list, 4, and at an odd one, 3, where only 0 and 1 are alike."""
    features = torch.eye(6)[None, [0, 0, 2, 3, 4, 5]].clone()
    features[0, 3:5, 0] = value
    for k, want in ((5, [0, 1, 2, 3, 5]), (4, [1, 2, 3, 5])):
        kept = vispruner(features, torch.arange(6.0).flip(0)[None], k, important_ratio=0.0, backend=backend)
        assert kept.indices.tolist() == [want]


def test_rejects_what_does_not_fit():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match=r"vispruner: saliency must have shape \[B, V, \.\.\.\] = \[1, 30"):
        vispruner(p.features[None], p.saliency[None, :7], 4)
    with pytest.raises(ValueError, match=r"vispruner: important_ratio must lie in \[0, 1\], got 1.5"):
        vispruner(p.features[None], p.saliency[None], 4, important_ratio=1.5)
