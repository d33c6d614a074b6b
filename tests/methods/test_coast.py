"""COAST against a transcription of its equations."""

import pytest
import torch

import tokenprune_kernels as tp
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
from tokenprune_kernels.methods import coast


def _expected(p: Prompt, k: int, **options):
    return transcriptions.coast(*p.numpy("query", "key", "rows", "indices", "features"), k, **options)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 12, 29, 30, 36])
def test_selects_what_the_equations_say(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k))
    kept = coast(
        p.query[None], p.key[None], p.features[None], k, key_indices=p.indices[None], backend=backend
    )  # the text stands at the end, so that the default positions are right
    assert_selected(kept, [expected["indices"]])
    assert kept.details["num_low"].tolist() == [expected["num_low"]]
    for name in ("anchors", "references"):
        assert [i for i in kept.details[name][0].tolist() if i >= 0] == expected[name]
    for name in ("global", "last", "contrast"):
        assert_close(kept.details[name][0], expected[name])
    assert_close(kept.details["entropy"], [expected["entropy"]])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 11, 20, 40])
def test_padding_changes_nothing(k, dtype, backend):
    """Samples with 30, 12 and 28 visual tokens in one batch: each is treated as if it were alone."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = coast(b.query, b.key, b.features, k, **b.attention, backend=backend)
    assert_selected(kept, [e["indices"] for e in expected])
    assert kept.details["num_low"].tolist() == [e["num_low"] for e in expected]
    for name in ("anchors", "references"):
        assert [[i for i in row if i >= 0] for row in kept.details[name].tolist()] == [e[name] for e in expected]


@over_backends
@pytest.mark.parametrize(
    "options",
    [
        {"anchors": 0.5},
        {"anchors": 0.0},
        {"anchors": 1.0},
        {"references": 0.4},
        {"context": (0.3, 0.9)},
        {"context": (1.0, 1.0)},
    ],
    ids=str,
)
def test_ratios(options, backend):
    names = {"anchors": "anchor_ratio", "references": "reference_ratio", "context": "context_ratio"}
    p, expected = decided(lambda seed: prompt(seed, torch.float32), lambda p: _expected(p, 16, **options))
    kept = coast(
        p.query[None], p.key[None], p.features[None], 16, key_indices=p.indices[None], backend=backend,
        **{names[n]: v for n, v in options.items()},
    )  # fmt: skip
    assert_selected(kept, [expected["indices"]])


@over_backends
def test_a_given_lse_may_cover_keys_that_are_not_passed(backend):
    p, expected = decided(lambda seed: prompt(seed, widest(backend)), lambda p: _expected(p, 12))
    _, lse = tp.attention_entropy(p.query[None], p.key[None], causal=True)
    only_visual = p.key[None][:, :, p.indices]
    kept = coast(p.query[None], only_visual, p.features[None], 12, lse=lse, causal=False, backend=backend)
    assert_selected(kept, [expected["indices"]])


@over_backends
def test_entropy_moves_the_share_of_context(backend):
    """Constant scores: H = 1 and the largest share; one token with all the attention: H near 0 and the smallest."""
    tokens, k = 256, 215  # K_rest = 43: 2.15 to 6.45 tokens of context
    key = torch.zeros(2, 1, tokens, 4)
    key[1, 0, 100] = 60.0
    features = torch.randn(2, tokens, 8)
    kept = coast(torch.ones(2, 1, 1, 4), key, features, k, causal=False, backend=backend)
    assert kept.details["num_low"].tolist() == [6, 2]
    assert kept.details["entropy"][0] == pytest.approx(1, abs=1e-6)
    assert kept.details["entropy"][1] == pytest.approx(0, abs=1e-6)
    assert kept.counts.tolist() == [k, k]


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [3, 12, 29])
def test_the_entropy_of_rows_is_the_other_reading(k, dtype, backend):
    """In a ragged batch, where rows and tokens are padded; a share of context that shows the difference."""
    options = {"anchors": 0.3, "context": (0.0, 1.0)}
    prompts, expected = decided(
        lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k, by_rows=True, **options) for p in ps]
    )
    b = batch(prompts)
    given = {"anchor_ratio": 0.3, "context_ratio": (0.0, 1.0), **b.attention, "backend": backend}
    kept = coast(b.query, b.key, b.features, k, entropy="rows", **given)
    assert_selected(kept, [e["indices"] for e in expected])
    assert kept.details["num_low"].tolist() == [e["num_low"] for e in expected]
    for i, e in enumerate(expected):
        assert_close(kept.details["entropy"][i], e["entropy"])
    default = coast(b.query, b.key, b.features, k, **given)
    assert (kept.details["entropy"] < default.details["entropy"]).all()  # a maximum over rows is more even
    named = coast(b.query, b.key, b.features, k, entropy="global", **given)
    assert all(torch.equal(t, named.details[name]) for name, t in default.details.items())


@over_backends
def test_the_entropy_of_rows_by_a_given_lse_and_of_rows_that_see_part_of_the_image(backend):
    """Rows among the visual tokens see those in front of them only."""
    p = prompt(0, widest(backend))
    more = {"key_indices": p.indices[None], "entropy": "rows", "backend": backend}
    _, lse = tp.attention_entropy(p.query[None], p.key[None], causal=True)
    alone, with_lse = (coast(p.query[None], p.key[None], p.features[None], 12, lse=t, **more) for t in (None, lse))
    assert_close(with_lse.details["entropy"], alone.details["entropy"])
    early = p._replace(rows=torch.tensor([5, 9, 20, 30]))
    kept = coast(early.query[None], early.key[None], early.features[None], 12, query_positions=early.rows[None], **more)
    assert_close(kept.details["entropy"], [_expected(early, 12, by_rows=True)["entropy"]])


@over_backends
def test_ties_go_to_the_lower_index(backend):
    """All tokens score alike: the first ones are anchors, references and candidates."""
    features = torch.ones(1, 20, 4)
    kept = coast(torch.zeros(1, 2, 3, 4), torch.randn(1, 2, 20, 4), features, 10, causal=False, backend=backend)
    assert kept.details["anchors"].tolist() == [list(range(8))]
    assert kept.details["references"].tolist() == [[0, 1]]
    assert kept.indices.tolist() == [list(range(10))]


def test_a_visual_token_with_a_masked_key_is_never_selected():
    p = prompt(0, torch.float32)
    hidden = torch.ones(1, p.key.shape[1], dtype=torch.bool)
    hidden[0, p.indices[3]] = False
    kept = coast(p.query[None], p.key[None], p.features[None], 40, key_indices=p.indices[None], key_mask=hidden)
    assert_selected(kept, [[i for i in range(30) if i != 3]])


def test_rejects_bad_arguments():
    p = prompt(0, torch.float32)
    query, key, features = p.query[None], p.key[None], p.features[None]
    with pytest.raises(ValueError, match="coast: features must have shape"):
        coast(query, key, features, 4)
    with pytest.raises(ValueError, match="coast: k must be non-negative"):
        coast(query, key, features, -1, key_indices=p.indices[None])
    with pytest.raises(ValueError, match=r"coast: k must lie in \(0, 1\] where it is a float"):
        coast(query, key, features, 2.5, key_indices=p.indices[None])
    with pytest.raises(TypeError, match="coast: context_ratio must be two ratios"):
        coast(query, key, features, 4, key_indices=p.indices[None], context_ratio=0.1)
    with pytest.raises(ValueError, match="coast: entropy must be global or rows, got 'columns'"):
        coast(query, key, features, 4, key_indices=p.indices[None], entropy="columns")
    with pytest.raises(ValueError, match="coast: anchor_ratio must lie in"):
        coast(query, key, features, 4, key_indices=p.indices[None], anchor_ratio=1.5)
