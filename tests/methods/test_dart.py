"""DART against a transcription: pivots, and what is least like them."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tokenprune_kernels.methods import dart


def _expected(p: Prompt, k: int, **options):
    return transcriptions.dart(*p.numpy("key", "features", "text", "indices", "rows"), k, **options)


def _kept(p: Prompt, k: int, **options):
    return dart(
        p.key[None], p.features[None], p.text[None], k, key_indices=p.indices[None], query_positions=p.rows[None],
        **options,
    )  # fmt: skip


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, 12, 13, 29, 30, 36])
def test_selects_what_the_steps_say(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k))
    kept = _kept(p, k, backend=backend)
    assert_selected(kept, [expected["indices"]])
    assert kept.counts.tolist() == [min(k, 30)]
    pivots = kept.details["pivots"][0].tolist()
    assert [i for i in pivots[:4] if i >= 0] == expected["of_image"]
    assert [i for i in pivots[4:] if i >= 0] == expected["of_text"]


@over_backends
@pytest.mark.parametrize(("image_pivots", "text_pivots"), [(0, 4), (4, 0), (1, 1), (40, 3), (2, 9)])
def test_any_number_of_pivots(image_pivots, text_pivots, backend):
    options = {"image_pivots": image_pivots, "text_pivots": text_pivots}
    p, expected = decided(lambda seed: prompt(seed, torch.float32), lambda p: _expected(p, 14, **options))
    assert_selected(_kept(p, 14, backend=backend, **options), [expected["indices"]])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [2, 9, 18, 40])
def test_padding_changes_nothing(k, dtype, backend):
    """The second sample has two text tokens, which share the budget of four, and too few visual ones for k = 18."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    listed = {name: b.attention[name] for name in ("key_indices", "query_positions", "key_mask")}
    kept = dart(b.key, b.features, b.text, k, text_mask=b.text_mask, backend=backend, **listed)
    assert_selected(kept, [e["indices"] for e in expected])


@over_backends
def test_copies_of_a_pivot_go_first(backend):
    """Half of the tokens repeat the only pivot: none of them is kept while others are left."""
    p = prompt(0, torch.float32)
    key = torch.zeros_like(p.key)
    key[:, p.indices[7]] = 1.0
    hidden = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    hidden[::2] = hidden[7]
    kept = _kept(p._replace(key=key, features=hidden), 15, image_pivots=1, text_pivots=0, backend=backend)
    assert kept.indices.tolist() == [[i for i in range(30) if i % 2]]


@over_backends
def test_a_key_with_nan_is_no_pivot_before_others(backend):
    """Nor is it before those whose norm is 0; it is one where there are no more."""
    p = prompt(0, torch.float32)
    key = torch.zeros_like(p.key)
    key[:, p.indices[1]] = 1.0
    key[0, p.indices[0]] = torch.nan
    p = p._replace(key=key)
    kept = _kept(p, 4, image_pivots=4, text_pivots=0, backend=backend)
    assert kept.indices.tolist() == [[1, 2, 3, 4]]
    kept = _kept(p, 30, image_pivots=30, text_pivots=0, backend=backend)
    assert kept.details["pivots"].tolist() == [[*range(1, 30), 0]]
