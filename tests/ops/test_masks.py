"""indices_to_mask: the way back from mask_to_indices, without a look at the values on the host."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenprune_kernels as tp


def test_entries_become_true() -> None:
    got = tp.indices_to_mask(torch.tensor([[3, 0, -1], [-1, -1, -1], [2, 2, 1]]), 4)
    assert got.tolist() == [[True, False, False, True], [False] * 4, [False, True, True, False]]


@settings(deadline=None, print_blob=True)
@given(st.integers(0, 4), st.integers(0, 50), st.integers(0, 60), st.integers(0, 2**31))
def test_the_way_back_from_mask_to_indices(batch: int, n: int, k: int, seed: int) -> None:
    mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    indices, counts = tp.mask_to_indices(mask, k)
    got = tp.indices_to_mask(indices, n)
    assert (got.shape, got.dtype) == (mask.shape, torch.bool)
    assert got.is_contiguous()
    assert torch.equal(got.sum(-1), counts)
    assert torch.equal(got, mask & (mask.cumsum(-1) <= k))


@pytest.mark.parametrize("value", [-2, 5, 6, 2**40, -(2**63), 2**63 - 1])
def test_entries_out_of_range_name_no_token(value: int) -> None:
    got = tp.indices_to_mask(torch.tensor([[1, value], [value, 4]]), 5)
    assert got.tolist() == [[False, True, False, False, False], [False, False, False, False, True]]


@pytest.mark.parametrize(("shape", "size"), [((0, 3), 4), ((2, 0), 4), ((2, 3), 0), ((0, 0), 0)])
def test_every_size_may_be_zero(shape: tuple[int, int], size: int) -> None:
    got = tp.indices_to_mask(torch.zeros(shape, dtype=torch.int64), size)
    assert got.shape == (shape[0], size)
    assert bool(got.any()) == (min(*shape, size) > 0)


def test_strides_are_free_and_the_input_is_not_touched() -> None:
    indices = torch.tensor([[0, 9], [9, 2], [1, 9], [-1, 9]]).T
    before = indices.clone()
    got = tp.indices_to_mask(indices, 3)
    assert got.tolist() == tp.indices_to_mask(indices.contiguous(), 3).tolist()
    assert torch.equal(indices, before)


def test_no_value_is_read_on_the_host() -> None:
    """A fake tensor has none: reading one raises."""
    with FakeTensorMode():
        got = tp.indices_to_mask(torch.zeros(2, 3, dtype=torch.int64), 7)
    assert got.shape == (2, 7)


def test_wrong_arguments_are_named() -> None:
    good = torch.tensor([[0]])
    for wrong in (good.bool(), good.byte(), good.float(), [[0]]):
        with pytest.raises(TypeError, match="indices_to_mask: indices must be an int64 tensor, got"):
            tp.indices_to_mask(wrong, 3)
    for wrong in (good[0], good.unsqueeze(0)):
        with pytest.raises(ValueError, match=r"indices_to_mask: indices must have shape \[B, K\], got"):
            tp.indices_to_mask(wrong, 3)
    for size in (1.5, None, True):
        with pytest.raises(TypeError, match="indices_to_mask: size must be an int, got"):
            tp.indices_to_mask(good, size)
    with pytest.raises(ValueError, match="indices_to_mask: size must be non-negative, got -1"):
        tp.indices_to_mask(good, -1)
