"""density_peaks against the published steps: cdist, topk, a mask of denser tokens, the smallest distance to one."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def published(features: Tensor, k: int, neighbors: int = 5) -> Tensor:
    """DPC-kNN as TCFormer wrote it down, without its noise and with the centres in ascending order."""
    distance = torch.cdist(features, features) / features.shape[-1] ** 0.5
    density = (-distance.topk(neighbors, dim=-1, largest=False).values.square().mean(-1)).exp()
    denser = (density.unsqueeze(1) > density.unsqueeze(2)).to(distance.dtype)
    largest = distance.flatten(1).amax(-1).view(-1, 1, 1)
    to_denser = (distance * denser + largest * (1 - denser)).amin(-1)
    return (to_denser * density).topk(k, dim=-1).indices.sort(-1).values


def same_centres(results: dict[str, Any]) -> None:
    """But for near ties, which rounding decides: 1 of 20."""
    for name, indices in results.items():
        common = set(indices[0].tolist()) & set(results["ours"][0].tolist())
        assert len(common) >= 0.95 * indices.shape[1], name


@pytest.mark.parametrize(
    ("n", "channels", "k"), [(576, 4096, 64), (576, 1024, 64), (2880, 1024, 320), (5000, 256, 320)]
)
def test_density_peaks(race: Any, n: int, channels: int, k: int) -> None:
    """Clusters of tokens, as images have them; the last size is beyond what is stored of the distances."""
    centres = torch.randn(k, channels)
    features = (centres[torch.randint(0, k, (n,))] + torch.randn(n, channels) * torch.rand(n, 1))[None]

    def check(results: dict[str, Any]) -> None:
        products = results.pop("product of all pairs alone")
        torch.testing.assert_close(products, torch.einsum("bic,bjc->bij", features, features), rtol=1e-4, atol=1e-2)
        same_centres(results)

    race(
        f"density_peaks {n}x{channels} -> {k}",
        {
            "ours": lambda: tp.density_peaks(features, k)[0],
            "cdist and topk": lambda: published(features, k),
            "product of all pairs alone": lambda: features @ features.mT,
        },
        check=check,
        target=("cdist and topk", 3.0) if n == 576 else None,
        seconds=2.0,
        note="half of the product of all pairs is needed, which bounds what float32 can reach",
    )
