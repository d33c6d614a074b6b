"""VidCom2 against a transcription: budgets of frames, and what is least redundant in them."""

import pytest
import torch
from torch import Tensor

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_close, assert_selected, batch, decided, over_dtypes, prompt
from tokenprune_kernels.methods import vidcom2

GRID = (3, 4)


def video(seed: int, dtype: torch.dtype, frames: int = 4) -> Prompt:
    return prompt(seed, dtype, GRID, crops=frames)


def _expected(p: Prompt, k: int):
    features, groups = p.numpy("features", "groups")
    return transcriptions.vidcom2(features, [len(groups) // _frames(p)] * _frames(p), k)


def _frames(p: Prompt) -> int:
    return int(p.groups.max()) + 1


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 4, 9, 13, 30, 47, 48, 60])
def test_selects_what_the_steps_say(k, dtype, backend):
    """Both more and fewer than K in the budgets together; in bfloat16 by float32 statistics of the given values."""
    p, expected = decided(lambda seed: video(seed, dtype), lambda p: _expected(p, k))
    kept = vidcom2(p.features[None], p.groups[None], k, backend=backend)
    assert_selected(kept, [expected["indices"]])
    assert_close(kept.details["redundancy"][0], expected["redundancy"])
    assert kept.details["budgets"][0].tolist() == [*expected["budgets"], *[0] * 44]


@over_backends
def test_the_rate_sets_the_budgets_and_k_the_number(backend):
    """A rate that is not K / V, as an engine's whose number is rounded or has a minimum."""

    def transcribe(p: Prompt):
        return transcriptions.vidcom2(p.numpy("features")[0], [12] * 4, 9, rate=0.4)

    p, expected = decided(lambda seed: video(seed, torch.float32), transcribe)
    kept = vidcom2(p.features[None], p.groups[None], 9, rate=0.4, backend=backend)
    assert_selected(kept, [expected["indices"]])
    assert kept.details["budgets"][0, :4].tolist() == expected["budgets"]
    assert sum(expected["budgets"]) > 9


@over_backends
def test_a_known_number_of_frames_changes_no_bit(backend):
    p = video(3, torch.float32)
    unknown = vidcom2(p.features[None], p.groups[None], 13, backend=backend)
    for frames in (4, 5, 1000):
        known = vidcom2(p.features[None], p.groups[None], 13, frames=frames, backend=backend)
        assert known.indices.tolist() == unknown.indices.tolist()
        assert torch.equal(known.details["redundancy"], unknown.details["redundancy"])
        budgets = unknown.details["budgets"][:, : min(frames, 48)]
        assert torch.equal(known.details["budgets"], budgets)
    # Tokens of the frames behind the last that there may be are not looked at.
    fewer = vidcom2(p.features[None], p.groups[None], 13, frames=2, backend=backend)
    alone = vidcom2(p.features[None, :24], p.groups[None, :24], 13, backend=backend)
    assert fewer.indices.tolist() == alone.indices.tolist()


@over_backends
@pytest.mark.parametrize("k", [3, 7, 14])
def test_padding_changes_nothing_and_samples_have_frames_of_their_own(k, backend):
    def make(seed: int) -> list[Prompt]:
        grids = ((3, 4), (2, 2), (1, 5))
        return [prompt(seed + i, torch.float32, grid, crops=3 + i % 2) for i, grid in enumerate(grids)]

    prompts, expected = decided(make, lambda ps: [_expected(p, k) for p in ps])
    b = batch(prompts)
    kept = vidcom2(b.features, b.groups, k, mask=b.mask, backend=backend)
    assert_selected(kept, [e["indices"] for e in expected])


@over_backends
def test_frames_of_other_sizes(backend):
    frames = [6, 4, 4, 8, 3]

    def features(seed: int) -> Tensor:
        return torch.randn(25, 8, generator=torch.Generator().manual_seed(seed))

    x, expected = decided(features, lambda x: transcriptions.vidcom2(x.double().numpy(), frames, 11))
    groups = torch.arange(5).repeat_interleave(torch.tensor(frames))
    assert_selected(vidcom2(x[None], groups[None], 11, backend=backend), [expected["indices"]])


@over_backends
def test_a_frame_unlike_the_video_gets_more(backend):
    """Three frames of one scene, and one of another: the softmax gives it nearly all that is above the mean."""
    g = torch.Generator().manual_seed(0)
    scene, other = torch.randn(2, 16, generator=g)
    x = torch.stack([scene, scene, other, scene]).repeat_interleave(12, 0) + 0.1 * torch.randn(48, 16, generator=g)
    budgets = vidcom2(x[None], torch.arange(4).repeat_interleave(12)[None], 16, backend=backend).details["budgets"]
    # r = 1/3: 12 r (1 + 1 - 1/4) = 7, and 12 r (1 - 1/4) = 3.
    assert budgets[0, :4].tolist() == [3, 3, 7, 3]


@over_backends
def test_a_slow_video_in_bfloat16_keeps_what_float64_keeps(backend):
    g = torch.Generator().manual_seed(0)
    step = torch.randn(8, 16, 64, generator=g) * torch.rand(8, 16, 1, generator=g) * 0.2
    x = (torch.randn(1, 16, 64, generator=g) + step.cumsum(0)).bfloat16().reshape(1, 128, 64)
    frame = torch.arange(8).repeat_interleave(16)[None]
    exact = vidcom2(x.double(), frame, 64, backend="reference")
    assert vidcom2(x, frame, 64, backend=backend).indices.tolist() == exact.indices.tolist()


@over_backends
def test_ties_go_to_the_lower_index(backend):
    """Two equal frames of equal tokens: of each its first ones."""
    frame = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    kept = vidcom2(torch.ones(1, 8, 4), frame, 4, backend=backend)
    assert kept.details["budgets"][0, :2].tolist() == [2, 2]
    assert kept.indices.tolist() == [[0, 1, 4, 5]]


@over_backends
def test_a_sample_does_not_depend_on_the_others_and_runs_are_equal(backend):
    p = [video(seed, torch.float32) for seed in (1, 2)]
    features, groups = (torch.stack([getattr(x, name) for x in p]) for name in ("features", "groups"))
    both, again = (vidcom2(features, groups, 17, backend=backend) for _ in range(2))
    assert torch.equal(both.details["redundancy"], again.details["redundancy"])
    alone = [vidcom2(f[None], g[None], 17, backend=backend).indices for f, g in zip(features, groups, strict=True)]
    assert torch.equal(torch.cat(alone), both.indices)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"frames": -1}, ValueError, "vidcom2: frames must be non-negative, got -1"),
        ({"frames": 4.0}, TypeError, "vidcom2: frames must be an int, got float"),
        ({"rate": 1.5}, ValueError, r"vidcom2: rate must lie in \[0, 1\], got 1.5"),
    ],
)
def test_rejects_options_out_of_range(option, error, message):
    p = video(0, torch.float32)
    with pytest.raises(error, match=message):
        vidcom2(p.features[None], p.groups[None], 3, **option)


def test_rejects_groups_of_other_tokens():
    p = video(0, torch.float32)
    with pytest.raises(ValueError, match=r"vidcom2: groups must have shape \[B, V, \.\.\.\] = \[1, 48"):
        vidcom2(p.features[None], p.groups[None, :7], 3)
