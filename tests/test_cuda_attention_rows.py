"""The row pass of the CUDA attention kernels (lse and entropy) on the host emulator, and the tile of dot products."""

from typing import Any

import emulator
import pytest
import torch
from cases import NO_EMULATOR, assert_as_good_as_torch, dtypes_of
from torch import Tensor

import tokenprune_kernels as tp

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
over_dtypes = pytest.mark.parametrize("dtype", dtypes_of("emulator"), ids=lambda d: str(d).removeprefix("torch."))
ENTROPY = "attention_rows_kernel"


def check(query: Tensor, key: Tensor, **options: Any) -> tuple[tuple[Tensor, Tensor], list[dict[str, Any]]]:
    """Entropy and lse compared with the reference in float64, and the launches that computed them."""
    emulator.load().take_launches()
    got = tp.attention_entropy(query, key, backend="emulator", **options)
    launches = emulator.load().take_launches()
    exact = tp.reference.attention_entropy(query.double(), key.double(), **options)
    plain = tp.reference.attention_entropy(query, key, **options)
    finite = exact[1][exact[1].isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    for mine, *others in zip(got, exact, plain, strict=True):
        assert_as_good_as_torch(mine, *others, scale=scale)
    return got, launches


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


@over_dtypes
@pytest.mark.parametrize("dim", [1, 8, 17, 64, 72, 80, 130, 256, 264, 1024])
def test_every_dot_product_of_a_tile(dtype: torch.dtype, dim: int) -> None:
    """With one visible key the lse is its logit: exact integers, at every place of a tile and its edges."""
    rows, keys = 70, 67
    query = torch.randint(-2, 3, (1, 1, rows, dim)).to(dtype)
    key = torch.randint(-2, 3, (keys, 1, 1, dim)).to(dtype)
    lse = tp.attention_entropy(query.expand(keys, 1, rows, dim), key, scale=1.0, backend="emulator")[1]
    assert torch.equal(lse[:, 0], (query[0].float() @ key[:, 0].mT.float())[:, :, 0])
    one = torch.eye(keys, dtype=torch.bool)
    at = tp.attention_entropy(query[:, :, :5].expand(keys, 1, 5, dim), key[:, 0, 0].expand(keys, 1, keys, dim),
                              key_mask=one, scale=1.0, backend="emulator")[1]  # fmt: skip
    assert torch.equal(at[:, 0], lse[:, 0, :5])
