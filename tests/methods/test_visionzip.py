"""VisionZip against a transcription of its three steps, and what it hands on to be put in place."""

import pytest
import torch
from torch import Tensor

from testing.cases import over_backends
from tests.methods import transcriptions_merging
from tests.methods.inputs import Prompt, assert_selected, batch, decided, over_dtypes, prompt, ragged
from tokenprune_kernels.methods import Selection, visionzip

RATIO = 0.4  # 30 tokens leave several to be merged into each target


def _expected(p: Prompt, k: int, keys: Tensor | None = None):
    features, saliency = p.numpy("features", "saliency")
    compared = features if keys is None else keys.double().numpy()
    return transcriptions_merging.visionzip(features, saliency, compared, k, round(RATIO * k))


def merging(kept: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, sizes and assignment."""
    assert kept.merged is not None
    assert kept.sizes is not None
    assert kept.assignment is not None
    return kept.merged, kept.sizes, kept.assignment


def assert_merged(kept: Selection, b: int, expected: dict) -> None:
    """Rows within the roundings of their dtype, sizes and assignment exactly, and nothing in padding."""
    n, tokens = len(expected["indices"]), len(expected["assignment"])
    merged, sizes, assignment = merging(kept)
    rows = merged[b, :n].double()
    exact = torch.as_tensor(expected["merged"]).reshape(rows.shape)
    # The mean is rounded, and the sum of it and the target.
    error = torch.finfo(merged.dtype).eps * exact.abs().amax() if n else 0.0
    torch.testing.assert_close(rows, exact, rtol=0, atol=float(error) + 2e-6)
    assert sizes[b].tolist() == [*expected["sizes"], *[0] * (sizes.shape[1] - n)]
    assert assignment[b].tolist() == [*expected["assignment"], *[-1] * (assignment.shape[1] - tokens)]
    assert not merged[b, n:].any()


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 8, 15, 28, 30, 40])
def test_selects_and_merges_what_the_steps_say(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _expected(p, k))
    kept = visionzip(p.features[None], p.saliency[None], k, contextual_ratio=RATIO, backend=backend)
    assert_selected(kept, [expected["indices"]])
    merged, sizes, _ = merging(kept)
    assert (merged.dtype, merged.shape) == (dtype, (1, k, p.features.shape[1]))
    assert sizes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_merged(kept, 0, expected)
    for name in ("dominant", "contextual"):
        assert [i for i in kept.details[name][0].tolist() if i >= 0] == expected[name]


@over_backends
@over_dtypes
def test_keys_of_another_space_decide_who_is_alike(dtype, backend):
    """The authors compare the mean over heads of the vision tower's keys."""

    def make(seed: int) -> tuple[Prompt, Tensor]:
        keys = torch.randn(30, 7, generator=torch.Generator().manual_seed(seed + 5))
        return prompt(seed, dtype), keys.to(dtype)

    (p, keys), expected = decided(make, lambda made: _expected(made[0], 10, made[1]))
    given = (p.features[None], p.saliency[None], 10)
    kept = visionzip(*given, keys=keys[None], contextual_ratio=RATIO, backend=backend)
    assert_merged(kept, 0, expected)
    by_features = visionzip(*given, contextual_ratio=RATIO, backend=backend)
    assert not torch.equal(merging(kept)[2], merging(by_features)[2])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 6, 11, 14])
def test_padding_changes_nothing(k, dtype, backend):
    """Each sample has a step of its own; at k = 14 the second one keeps all of its twelve tokens."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = visionzip(b.features, b.saliency, k, mask=b.mask, contextual_ratio=RATIO, backend=backend)
    assert_selected(kept, [e["indices"] for e in expected])
    for i, e in enumerate(expected):
        assert_merged(kept, i, e)


@over_backends
def test_a_sample_does_not_depend_on_the_others_and_runs_are_equal(backend):
    p = [prompt(seed, torch.float32) for seed in (1, 2)]
    features, saliency = (torch.stack([getattr(x, name) for x in p]) for name in ("features", "saliency"))
    both, again = (visionzip(features, saliency, 9, backend=backend) for _ in range(2))
    assert all(map(torch.equal, merging(both), merging(again)))
    for i in range(2):
        alone = visionzip(features[i : i + 1], saliency[i : i + 1], 9, backend=backend)
        assert all(torch.equal(one[0], of_both[i]) for one, of_both in zip(merging(alone), merging(both), strict=True))


@over_backends
def test_ties_go_to_the_lower_index_and_the_first_target(backend):
    """All tokens are alike: the first are dominant, and everything joins the first target."""
    kept = visionzip(torch.ones(1, 12, 4), torch.ones(1, 12), 4, contextual_ratio=0.5, backend=backend)
    assert kept.details["dominant"].tolist() == [[0, 1]]
    assert kept.details["contextual"].tolist() == [[2, 7]]
    merged, sizes, _ = merging(kept)
    assert sizes.tolist() == [[1, 1, 9, 1]]
    assert merged[0, :, 0].tolist() == [1, 1, 2, 1]  # a target that others joined counts twice


@over_backends
@pytest.mark.parametrize(("k", "contextual"), [(63, 10), (64, 10), (127, 20), (128, 20), (191, 30), (192, 30)])
def test_the_authors_settings_with_and_without_their_cls_token(k, contextual, backend):
    g = torch.Generator().manual_seed(0)
    kept = visionzip(torch.randn(1, 256, 8, generator=g), torch.rand(1, 256, generator=g), k, backend=backend)
    assert kept.details["contextual"].shape == (1, contextual)
    assert kept.counts.tolist() == [k]
    assert merging(kept)[1].sum() == 256  # no token is lost


@over_backends
def test_a_token_without_a_likeness_joins_none(backend):
    """A key of NaN: there, it joins the first target and makes it NaN."""
    p = prompt(0, torch.float32)
    kept = visionzip(p.features[None], p.saliency[None], 6, backend=backend)
    dropped = next(i for i in range(30) if i not in kept.indices[0].tolist())
    features = p.features.clone()
    features[dropped] = torch.nan
    merged, _, assignment = merging(visionzip(features[None], p.saliency[None], 6, backend=backend))
    assert assignment[0, dropped] == -1
    assert merged.isfinite().all()


def test_rejects_what_does_not_fit():
    p = prompt(0, torch.float32)
    with pytest.raises(ValueError, match=r"visionzip: saliency must have shape \[B, V, \.\.\.\] = \[1, 30"):
        visionzip(p.features[None], p.saliency[None, :7], 4)
    with pytest.raises(ValueError, match=r"visionzip: contextual_ratio must lie in \[0, 1\], got 1.5"):
        visionzip(p.features[None], p.saliency[None], 4, contextual_ratio=1.5)
    with pytest.raises(ValueError, match=r"merge_tokens: keys must have shape \[B, N"):
        visionzip(p.features[None], p.saliency[None], 4, keys=p.features[None, :7])
