"""SparseVLM against a transcription of its raters, its scores and its recycling, and the rank rule of its budget."""

import numpy as np
import pytest
import torch
from torch import Tensor

from testing.cases import over_backends
from tests.methods import transcriptions, transcriptions_merging
from tests.methods.inputs import Prompt, assert_close, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tests.methods.test_visionzip import assert_merged, merging
from tokenprune_kernels.methods import Selection, get_method, sparsevlm
from tokenprune_kernels.methods.sparsevlm import _shares


def _prompt(seed: int, dtype: torch.dtype, grid: tuple[int, int] = (9, 10), rows: int = 4) -> Prompt:
    """Text of a size at which its softmax is no choice of one token."""
    p = prompt(seed, dtype, grid, rows=rows)
    return p._replace(text=p.text / 4)


def _expected(p: Prompt, k: int, recycles: bool = True):
    names = ("query", "key", "rows", "indices", "features", "features", "text")
    return transcriptions_merging.sparsevlm(*p.numpy(*names), k, recycles)


def _call(p: Prompt, k: int, **more) -> Selection:
    given = (t[None] for t in (p.query, p.key, p.features, p.features, p.text))
    return sparsevlm(*given, k, key_indices=p.indices[None], **more)


def _assert_rated(kept: Selection, b: int, expected: dict) -> None:
    n = len(expected["attention"])
    assert_close(kept.details["attention"][b, :n], expected["attention"])
    assert kept.details["raters"][b].nonzero().flatten().tolist() == expected["raters"]


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 8, 20, 45, 89, 90, 99])
def test_selects_and_recycles_what_the_steps_say(k, dtype, backend):
    """Of 90 tokens, with up to four clusters, also where half of the budget bounds their number."""
    p, expected = decided(lambda seed: _prompt(seed, dtype), lambda p: _expected(p, k))
    kept = _call(p, k, backend=backend)
    assert_selected(kept, [expected["indices"]])
    _assert_rated(kept, 0, expected)
    assert [i for i in kept.details["centres"][0].tolist() if i >= 0] == expected["centres"]
    merged, sizes, _ = merging(kept)
    assert (merged.dtype, merged.shape) == (dtype, (1, k, p.features.shape[1]))
    assert sizes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_merged(kept, 0, expected)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 20, 40])
def test_version_2_recycles_nothing(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k, recycles=False))
    kept = _call(p, k, recycle_ratio=None, backend=backend)
    assert_selected(kept, [expected["indices"]])
    _assert_rated(kept, 0, expected)
    assert (kept.merged, kept.sizes, kept.assignment) == (None, None, None)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [6, 11, 30])
def test_padding_changes_nothing(k, dtype, backend):
    """Samples of one number of tokens, the second one with half of the others' text."""

    def make(seed: int) -> list[Prompt]:
        return [_prompt(seed + i, dtype, (6, 10), rows=2 if i == 1 else 4) for i in range(3)]

    prompts, expected = decided(make, lambda ps: [_expected(p, k) for p in ps])
    b = batch([prompts[0], prompts[1], _wider(prompts[2])])
    short = torch.arange(70) < 60  # the third is 70 tokens wide, ten of them padding
    indices = torch.where(short, b.attention["key_indices"], -1)
    kept = sparsevlm(
        b.query, b.key, b.features, b.features, b.text, k, count=60, input_mask=short.expand(3, -1),
        **{**b.attention, "key_indices": indices}, backend=backend,
    )  # fmt: skip
    assert_selected(kept, [e["indices"] for e in expected])
    for i, e in enumerate(expected):
        _assert_rated(kept, i, e)
        assert_merged(kept, i, e)


def _wider(p: Prompt) -> Prompt:
    """The prompt with ten more visual tokens of large values, in no key's column."""
    more = {name: torch.cat([getattr(p, name), torch.full_like(getattr(p, name)[:10], 99)]) for name in
            ("features", "positions", "groups", "saliency")}  # fmt: skip
    return p._replace(indices=torch.cat([p.indices, p.indices[:10]]), **more)


@over_backends
@pytest.mark.parametrize("k", [5, 9, 14, 28])
def test_samples_of_other_sizes_keep_at_most_their_own(k, backend):
    """Shares follow from the longest; what is kept, recycled and lost adds up in each sample."""
    b = batch(ragged(0, torch.float32))
    kept = sparsevlm(
        b.query, b.key, b.features, b.features, b.text, k, input_mask=b.mask, **b.attention, backend=backend
    )
    assert kept.counts.tolist() == [min(k, n) for n in (30, 12, 28)]
    _, sizes, assignment = merging(kept)
    for i in range(3):
        held = assignment[i][assignment[i] >= 0]
        assert torch.bincount(held, minlength=k).tolist() == sizes[i].tolist()
        assert bool((assignment[i, kept.indices[i, : kept.counts[i]]] == torch.arange(kept.counts[i])).all())


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.55, 1.0])
def test_the_shares_are_the_largest_own_part_that_fits(ratio):
    for tokens in (*range(1, 130), 576, 577, 2880):
        for k in {*range(min(tokens, 90) + 3), tokens // 2, tokens - 1}:
            assert _shares(k, tokens, ratio) == transcriptions_merging.sparsevlm_shares(tokens, k, ratio)


def test_the_authors_table_of_llava():
    """Their 300, 200 and 110 of 576 tokens, and 9, 4 and 3 recycled rows; the default schedule keeps so many."""
    left, at = 576, get_method("sparsevlm").scheduled(32)
    assert list(at) == [3, 7, 16]
    for share, own, clusters in zip(at.values(), (300, 200, 110), (9, 4, 3), strict=True):
        k = int(share * 576)
        assert _shares(k, left, 0.3) == (own, int(0.3 * (left - own)) + 1, clusters)
        left = k


def _with_embeddings(p: Prompt, visual: Tensor, text: Tensor, backend: str) -> Selection:
    return sparsevlm(
        p.query[None], p.key[None], p.features[None], visual[None], text[None], 8, key_indices=p.indices[None],
        backend=backend,
    )  # fmt: skip


@over_backends
def test_a_token_at_the_mean_does_not_rate_and_without_any_all_do(backend):
    p = prompt(0, torch.float32)
    visual = torch.ones(5, 1)
    three = torch.tensor([[2.0], [1.0], [1.0], [0.0]])  # e^2, e, e, 1: only the first is above their mean
    assert _with_embeddings(p, visual, three, backend).details["raters"].tolist() == [[True, False, False, False]]
    equal = _with_embeddings(p, visual, torch.ones(4, 1), backend)
    assert equal.details["raters"].all()
    assert equal.details["attention"].isfinite().all()
    # The other visual tokens of the prompt vote too, those that an earlier stage dropped among them.
    other = torch.tensor([[1.0], [-9.0], [-9.0], [-9.0]])
    assert _with_embeddings(p, other, three, backend).details["raters"].tolist() == [[False, False, False, True]]


@over_backends
def test_a_sample_does_not_depend_on_the_others_and_runs_are_equal(backend):
    ps = [_prompt(seed, torch.float32) for seed in (1, 2)]
    given = [torch.stack([getattr(p, n) for p in ps]) for n in ("query", "key", "features", "features", "text")]
    indices = torch.stack([p.indices for p in ps])
    both, again = (sparsevlm(*given, 20, key_indices=indices, backend=backend) for _ in range(2))
    assert all(map(torch.equal, merging(both), merging(again)))
    for i, p in enumerate(ps):
        alone = _call(p, 20, backend=backend)
        assert all(torch.equal(one[0], of_both[i]) for one, of_both in zip(merging(alone), merging(both), strict=True))


def _rank_rule(p: Prompt, scale: float, bias: float) -> int:
    rows = transcriptions.attention(*p.numpy("query", "key", "rows")).mean(0)
    rows = rows[_expected(p, 1, recycles=False)["raters"]][:, p.indices]
    rank = int(np.linalg.matrix_rank(rows.astype(np.float32)))
    return len(p.indices) if rank == len(p.indices) else min(int(rank * scale + bias), len(p.indices) - 1)


@over_backends
@pytest.mark.parametrize(("scale", "bias"), [(2.5, 0.0), (3.3, 2.0), (50.0, 0.0), (0.0, -4.0)])
def test_the_rank_rule_is_a_budget_on_the_device(scale, bias, backend):
    """Samples of other sizes and numbers of raters; above V - 1 and below 0 it is clipped."""
    prompts, expected = decided(
        lambda seed: ragged(seed, torch.float32),
        lambda ps: [_expected(p, max(0, _rank_rule(p, scale, bias)), recycles=False)["indices"] for p in ps],
    )
    b = batch(prompts)
    kept = sparsevlm(
        b.query, b.key, b.features, b.features, b.text, 40, input_mask=b.mask, recycle_ratio=None, rank_scale=scale,
        rank_bias=bias, **b.attention, backend=backend,
    )  # fmt: skip
    assert_selected(kept, expected)


@over_backends
def test_equal_raters_have_rank_one_and_a_full_rank_prunes_nothing(backend):
    """Four rows of which two and two are equal; three tokens that four rows tell apart."""
    p = prompt(0, torch.float32)
    g = torch.Generator().manual_seed(0)
    options = {"causal": False, "recycle_ratio": None, "rank_scale": 2.0, "backend": backend}
    text = torch.zeros(1, 4, 12)  # all rows rate
    query = torch.randn(1, 4, 2, 16, generator=g).repeat(1, 1, 2, 1)
    kept = sparsevlm(query, p.key[None], p.features[None, :1].expand(1, 37, 12), p.features[None], text, 30, **options)
    assert kept.counts.tolist() == [4]
    query, key, features = (torch.randn(1, *shape, generator=g) for shape in ((1, 4, 8), (1, 3, 8), (3, 12)))
    assert sparsevlm(query, key, features, features, text, 3, **options).counts.tolist() == [3]


@over_backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_attention_that_is_no_number_adds_no_rank_and_stops_no_other_sample(value, backend):
    """The singular values of such a matrix are an error of the whole batch."""
    b = batch([prompt(0, torch.float32)] * 2)
    b.query[0] = value
    kept = sparsevlm(
        b.query, b.key, b.features, b.features, b.text, 9, recycle_ratio=None, rank_scale=1.0, rank_bias=2.0,
        **b.attention, backend=backend,
    )  # fmt: skip
    rank = int(kept.details["raters"][1].sum())
    assert kept.counts.tolist() == [2, rank + 2]


def test_rejects_what_does_not_fit():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match=r"sparsevlm: rank_scale must come with recycle_ratio=None.*got 0.3"):
        _call(p, 9, rank_scale=13.5)
    with pytest.raises(ValueError, match=r"sparsevlm: recycle_ratio must lie in \[0, 1\], got -0.1"):
        _call(p, 9, recycle_ratio=-0.1)
    with pytest.raises(ValueError, match=r"sparsevlm: features must have shape \[B, V, \.\.\.\] = \[1, 30"):
        _call(p._replace(features=p.features[:7]), 9)
