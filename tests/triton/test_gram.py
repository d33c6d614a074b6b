"""Triton's products of all pairs of tokens, which the greedy ops and their starts read: results and configurations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testing.cases import NO_TRITON

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


def test_tiles_of_the_triangle() -> None:
    """Even and odd numbers of tiles, the last one partly filled: inner products of all pairs, symmetric to the bit."""
    from tokenprune_kernels.triton import gram

    for n in (1, 64, 65, 130, 200):
        features = torch.randint(-3, 4, (2, n, 70)).float()
        dots, inverse = gram.gram(features)
        assert torch.equal(dots[:, :, :n], features @ features.mT)
        torch.testing.assert_close(inverse, 1 / features.norm(dim=-1), rtol=3e-7, atol=0)


@settings(deadline=None, max_examples=200)
@given(batch=st.integers(0, 5000), n=st.integers(0, 70000), channels=st.integers(0, 9000))
def test_configurations(batch: int, n: int, channels: int) -> None:
    from tokenprune_kernels.triton import gram
    from tokenprune_kernels.triton.runtime import Target

    assert gram.stores_gram(n) == (n <= 3072)
    if n <= 3072:
        group = gram.samples_at_once(n)
        assert group >= 1
        assert group * n * gram.gram_pitch(n) * 4 <= 256 << 20
        assert 0 <= gram.gram_pitch(n) - n < 16
    limits = {
        Target("cuda", 80): 163,
        Target("cuda", 90): 227,
        Target("cuda", 100): 227,
        Target("hip", "gfx942", 64): 64,
    }
    for where, limit in limits.items():
        for itemsize in (2, 4):
            tile = gram.gram_config(where, itemsize, gram.large_tiles(batch, n))
            side, depth = tile.blocks["BLOCK"], tile.blocks["BLOCK_C"]
            operands = 2 * side * depth * itemsize * tile.num_stages
            assert max(operands, 4 * side * side) <= limit * 1024
            row = gram.row_config(where, itemsize, channels)
            assert row.blocks["BLOCK_T"] * row.blocks["BLOCK_C"] <= 32 * 32 * row.num_warps
    best = gram.best_block(-(-n // 16))
    assert best & (best - 1) == 0
