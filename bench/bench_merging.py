"""merge_tokens against the usual code: normalise, a matrix product, argmax, and a product with a one-hot matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (tokens, width of values, targets, width of keys): DPC-like merging, VisionZip's keys of one head, LLaVA-NeXT.
SHAPES = [(576, 1024, 64, 1024), (576, 4096, 54, 64), (2880, 4096, 320, 128)]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def usual(values: Tensor, keys: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32, as the means are; the product sums in its own order."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    joined = (unit @ unit.take_along_dim(targets.unsqueeze(-1), 1).mT).argmax(-1)
    joined.scatter_(1, targets, torch.arange(targets.shape[1]).expand_as(targets))
    member = torch.nn.functional.one_hot(joined, targets.shape[1]).float()
    sizes = member.sum(1)
    return ((member.mT @ values.float()) / sizes.unsqueeze(-1)).to(values.dtype), sizes, joined


def same(results: dict[str, Any]) -> None:
    """Means to rounding, who joined whom but for near ties: 1 of 1000 tokens."""
    for merged, sizes, joined in results.values():
        differ = joined != results["ours"][2]
        assert int(differ.sum()) <= joined.numel() / 1000
        agreed = torch.ones_like(sizes, dtype=torch.bool)
        for other in (joined, results["ours"][2]):
            agreed[0, other[differ]] = False
        assert torch.equal(sizes[agreed], results["ours"][1][agreed])
        torch.testing.assert_close(merged[agreed], results["ours"][0][agreed], rtol=2e-2, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width", "k", "of_keys"), SHAPES)
def test_merge(race: Any, n: int, width: int, k: int, of_keys: int, dtype: str) -> None:
    values = torch.randn(1, n, width).to(DTYPES[dtype])
    keys = values if of_keys == width else torch.randn(1, n, of_keys).to(DTYPES[dtype])
    targets = torch.randperm(n)[:k].sort().values[None]
    race(
        f"merge_tokens {n}x{width} to {k}, keys of {of_keys}, {dtype}",
        {
            "ours": lambda: tp.merge_tokens(values, targets, keys=keys),
            "normalise, product, argmax, one-hot": lambda: usual(values, keys, targets),
        },
        check=same,
        target=("normalise, product, argmax, one-hot", 3.0),
        seconds=1.5,
    )


def test_sums_alone(race: Any) -> None:
    """Who joins whom is given, as after another selection."""
    values, targets = torch.randn(1, 2880, 4096), torch.arange(320)[None]
    joined = torch.randint(0, 320, (1, 2880))

    def one_hot() -> tuple[Tensor, Tensor, Tensor]:
        member = torch.nn.functional.one_hot(joined, 320).float()
        sizes = member.sum(1)
        return torch.where(sizes.unsqueeze(-1) > 0, member.mT @ values / sizes.unsqueeze(-1), 0), sizes, joined

    race(
        "merge_tokens 2880x4096 to 320, assignment given",
        {"ours": lambda: tp.merge_tokens(values, targets, assignment=joined), "one-hot": one_hot},
        check=same,
        seconds=1.5,
    )
