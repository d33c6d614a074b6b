"""Random prompts with an image in them, their padding to a batch, and the comparison with a transcription."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from testing.cases import dtypes_of
from tests.methods import transcriptions
from tests.methods.transcriptions import NearTieError
from tokenprune_kernels.methods import Selection

DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # float16 adds nothing: arithmetic is float32 as for bfloat16


def widest(backend: str) -> torch.dtype:
    """float64 where the backend takes it, so that rounding decides nothing."""
    return dtypes_of(backend)[-1]


over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64", "bfloat16"))
GRIDS = ((5, 6), (3, 4), (4, 7))  # the samples of a batch: different numbers of visual tokens


class Prompt(NamedTuple):
    """One unpadded sample: three tokens before the image, the image, and the text whose rows are the queries."""

    query: Tensor  # [Hq, M, D]
    key: Tensor  # [Hkv, N, D]
    rows: Tensor  # [M], positions of the query rows
    indices: Tensor  # [V], positions of the visual tokens
    features: Tensor  # [V, C]
    positions: Tensor  # [V, 2], int64
    groups: Tensor  # [V]
    grid: tuple[int, int]
    text: Tensor  # [T, C]
    saliency: Tensor  # [V]

    def numpy(self, *names: str) -> list[Any]:
        values = [getattr(self, n) for n in names]
        return [v.double().numpy() if v.is_floating_point() else v.numpy() for v in values]


def row_scores(p: Prompt, how: str) -> np.ndarray:
    """The attention that the visual tokens receive: of the last query row, or the mean of all rows."""
    return transcriptions.row_scores(*p.numpy("query", "key", "rows", "indices"), how)


def most_attended(p: Prompt, k: int, how: str) -> list[int]:
    scores = row_scores(p, how)
    return transcriptions.best(scores, range(len(scores)), k)


def prompt(seed: int, dtype: torch.dtype, grid: tuple[int, int] = (5, 6), crops: int = 1, rows: int = 4) -> Prompt:
    draw = torch.Generator().manual_seed(seed)
    channels, dim, before = 12, 16, 3
    visual = grid[0] * grid[1] * crops
    cell = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    # Features in a few tight clusters, so that suppression of similar neighbours has something to do.
    centre = torch.randn(4, channels, generator=draw)
    features = centre[torch.randint(4, (visual,), generator=draw)] + 0.2 * torch.randn(visual, channels, generator=draw)
    # Multiples of a quarter, four or two rows: their mean is exact in bfloat16.
    text = torch.randint(-8, 9, (rows, channels), generator=draw) / 4
    return Prompt(
        query=torch.randn(4, rows, dim, generator=draw).to(dtype),
        key=torch.randn(2, before + visual + rows, dim, generator=draw).to(dtype),
        rows=torch.arange(before + visual, before + visual + rows),
        indices=torch.arange(before, before + visual),
        features=features.to(dtype),
        positions=cell.repeat(crops, 1),
        groups=torch.arange(crops).repeat_interleave(grid[0] * grid[1]),
        grid=grid,
        text=text.to(dtype),
        saliency=torch.rand(visual, generator=draw).to(dtype),
    )


def _stack(rows: list[Tensor], dim: int, filler: float) -> Tensor:
    """[.., n_b, ..] for each sample -> [B, .., max n_b, ..], with `filler` after the end of each sample."""
    longest = max(r.shape[dim] for r in rows)
    padded = []
    for r in rows:
        shape = list(r.shape)
        shape[dim] = longest - r.shape[dim]
        padded.append(torch.cat([r, r.new_full(shape, filler)], dim))
    return torch.stack(padded)


class Batch(NamedTuple):
    """Prompts padded on the right. What the padding holds is large, so that it wins wherever it is looked at."""

    query: Tensor
    key: Tensor
    features: Tensor
    positions: Tensor
    groups: Tensor
    grid: Tensor
    text: Tensor
    saliency: Tensor
    text_mask: Tensor
    mask: Tensor
    attention: dict[str, Tensor]  # the keywords of the attention-based methods


def batch(prompts: list[Prompt]) -> Batch:
    key_indices = _stack([p.indices for p in prompts], 0, -1)
    true = torch.ones_like
    return Batch(
        query=_stack([p.query for p in prompts], 1, 50.0),
        key=_stack([p.key for p in prompts], 1, 50.0),
        features=_stack([p.features for p in prompts], 0, -9.0),
        positions=torch.stack(  # the padding lies far outside of the grid, in both directions
            [_stack([p.positions[:, 0] for p in prompts], 0, 40), _stack([p.positions[:, 1] for p in prompts], 0, -40)],
            -1,
        ),
        groups=_stack([p.groups for p in prompts], 0, 0),
        grid=torch.tensor([p.grid for p in prompts]),
        text=_stack([p.text for p in prompts], 0, 1e4),
        saliency=_stack([p.saliency for p in prompts], 0, 1e4),
        text_mask=_stack([true(p.rows, dtype=torch.bool) for p in prompts], 0, False),
        mask=key_indices >= 0,
        attention={
            "key_indices": key_indices,
            "query_positions": _stack([p.rows for p in prompts], 0, 0),
            "query_mask": _stack([true(p.rows, dtype=torch.bool) for p in prompts], 0, False),
            "key_mask": _stack([torch.ones(p.key.shape[1], dtype=torch.bool) for p in prompts], 0, False),
        },
    )


def arguments(b: Batch) -> dict[str, Any]:
    """Everything that a method may ask for, with stand-ins for what only a decoder layer or several crops have."""
    return {
        "next_query": b.query, "next_key": b.key, "next_scale": None,
        "query": b.query, "key": b.key, "scale": None, "lse": None, "causal": True, "layout": "bhld",
        **b.attention,
        "features": b.features, "visual_embeddings": b.features, "unrotated_key": b.features,
        "text_embeddings": b.text, "text_mask": b.text_mask, "saliency": b.saliency,
        "positions": b.positions, "stacked_positions": b.positions, "grid": b.grid, "groups": b.groups,
        "input_features": b.features, "input_text": b.text, "input_mask": b.mask, "count": b.mask.shape[1],
        "mask": b.mask, "present": b.mask, "n": b.mask.shape[1], "generator": None,
    }  # fmt: skip


def ragged(seed: int, dtype: torch.dtype) -> list[Prompt]:
    return [prompt(seed + i, dtype, grid, rows=2 if i == 1 else 4) for i, grid in enumerate(GRIDS)]


def decided(make: Callable[[int], Any], transcribe: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The first inputs whose transcription has no near tie, and its result."""
    for seed in range(0, 400, 10):
        inputs = make(seed)
        try:
            return inputs, transcribe(inputs)
        except NearTieError:
            continue
    raise AssertionError("no inputs without near ties in 40 tries")


def assert_selected(kept: Selection, expected: list[list[int]]) -> None:
    """Exactly these tokens for each sample, ascending, -1 after the end, and the right counts."""
    width = kept.indices.shape[1]
    rows = [[*sorted(row), *[-1] * (width - len(row))] for row in expected]
    assert kept.indices.dtype == kept.counts.dtype == torch.int64
    assert kept.indices.tolist() == rows
    assert kept.counts.tolist() == [len(row) for row in expected]


def assert_close(got: Tensor, expected: Any) -> None:
    """A float detail of one sample against the transcription: float32 arithmetic with logits up to about 100."""
    torch.testing.assert_close(got.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=2e-5, atol=2e-6)
