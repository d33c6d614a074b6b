"""EVS against a transcription: what changed since the frame before."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import Prompt, assert_close, assert_selected, batch, decided, over_dtypes, prompt
from tokenprune_kernels.methods import evs

GRID = (3, 4)


def video(seed: int, dtype: torch.dtype, frames: int = 4) -> Prompt:
    return prompt(seed, dtype, GRID, crops=frames)


def _expected(p: Prompt, k: int):
    features, groups = p.numpy("features", "groups")
    return transcriptions.evs(features, [12] * (int(groups.max()) + 1), k)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 12, 13, 30, 47, 48, 60])
def test_selects_what_the_steps_say(k, dtype, backend):
    """The first frame, then what differs most; in bfloat16 by the exact cosines of the given values."""
    p, expected = decided(lambda seed: video(seed, dtype), lambda p: _expected(p, k))
    kept = evs(p.features[None], p.groups[None], k, grid=GRID, backend=backend)
    assert_selected(kept, [expected["indices"]])
    assert_close(kept.details["dissimilarity"][0], expected["dissimilarity"])


@over_backends
def test_padding_changes_nothing_and_samples_have_grids_of_their_own(backend):
    def make(seed: int) -> list[Prompt]:
        return [prompt(seed + i, torch.float32, grid, crops=3) for i, grid in enumerate(((3, 4), (2, 2), (1, 5)))]

    def transcribe(prompts: list[Prompt]) -> list:
        frames = [[p.grid[0] * p.grid[1]] * 3 for p in prompts]
        return [transcriptions.evs(*p.numpy("features"), f, 14) for p, f in zip(prompts, frames, strict=True)]

    prompts, expected = decided(make, transcribe)
    b = batch(prompts)
    for grid in (b.grid, b.grid.unsqueeze(1).expand(-1, b.features.shape[1], 2), b.grid.float()):
        kept = evs(b.features, b.groups, 14, grid=grid, mask=b.mask, backend=backend)
        assert_selected(kept, [e["indices"] for e in expected])


@over_backends
@pytest.mark.parametrize("grid", [(0, 3), (3, 4), (6, 4), (7, 7), (9, 9)])
def test_one_grid_is_as_the_grid_of_every_token(grid, backend):
    """Frames of one size are compared without a copy, also where they are larger than the sample, or empty."""
    p = video(5, torch.float32)
    area = max(1, grid[0] * grid[1])
    groups = torch.arange(48)[None] // area
    one = evs(p.features[None], groups, 20, grid=grid, backend=backend)
    each = evs(p.features[None], groups, 20, grid=torch.tensor([grid]), backend=backend)
    assert one.indices.tolist() == each.indices.tolist()
    assert torch.equal(one.details["dissimilarity"], each.details["dissimilarity"])


@over_backends
def test_frames_of_other_sizes_start_anew(backend):
    """An image of 6 tokens, a video of 4 frames of 4 tokens, an image of 3 tokens."""
    frames = [6, 4, 4, 4, 4, 3]
    sides = {6: (2, 3), 4: (2, 2), 3: (1, 3)}

    def features(seed: int) -> torch.Tensor:
        return torch.randn(25, 8, generator=torch.Generator().manual_seed(seed))

    x, expected = decided(features, lambda x: transcriptions.evs(x.double().numpy(), frames, 17))
    groups = torch.arange(6).repeat_interleave(torch.tensor(frames))
    grid = torch.tensor([sides[n] for n in frames for _ in range(n)])
    kept = evs(x[None], groups[None], 17, grid=grid[None], backend=backend)
    assert_close(kept.details["dissimilarity"][0], expected["dissimilarity"])
    assert_selected(kept, [expected["indices"]])


@over_backends
def test_a_slow_video_in_bfloat16_keeps_what_float64_keeps(backend):
    """Rounded to bfloat16, as the engines compute them, most of these cosines are equal."""
    g = torch.Generator().manual_seed(0)
    step = torch.randn(8, 16, 64, generator=g) * torch.rand(8, 16, 1, generator=g) * 0.2
    slow = (torch.randn(1, 16, 64, generator=g) + step.cumsum(0)).bfloat16()
    x = slow.reshape(1, 128, 64)
    frame = torch.arange(8).repeat_interleave(16)[None]
    exact = evs(x.double(), frame, 64, grid=(4, 4), backend="reference")
    assert evs(x, frame, 64, grid=(4, 4), backend=backend).indices.tolist() == exact.indices.tolist()
    rounded = torch.cosine_similarity(slow[1:], slow[:-1], dim=-1)
    assert len(rounded.unique()) < 30  # 112 cosines


@over_backends
def test_tokens_with_nan_come_last(backend):
    x = video(0, torch.float32, frames=2).features.clone()
    x[15, 0] = torch.nan
    kept = evs(x[None], torch.arange(2).repeat_interleave(12)[None], 23, grid=GRID, backend=backend)
    assert kept.indices.tolist() == [[i for i in range(24) if i != 15]]


def test_rejects_a_grid_of_another_shape():
    p = video(0, torch.float32)
    with pytest.raises(ValueError, match=r"evs: grid must have shape \[B, 2\] or \[B, V, 2\]"):
        evs(p.features[None], p.groups[None], 3, grid=torch.ones(3, 2))
