"""Swapping the selection function of a pure-PyTorch pruning library for ours: same tensors in, same indices out.

    python examples/drop_in_selection.py

The library below is a stand-in written for this example: like the public ones, it picks tokens one by one in a Python
loop. Nothing else of it changes.
"""

import time
from types import SimpleNamespace

import torch
from torch import Tensor

import tokenprune_kernels as tp


def loop_of_the_library(features: Tensor, k: int) -> Tensor:
    """Max-min diversity, as the library does it: [N, C] -> [k] indices in order of selection."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    cosine = unit @ unit.T
    nearest = cosine.clone().fill_diagonal_(-torch.inf).amax(1)
    chosen = [int(nearest.argmin())]
    closest = cosine[chosen[0]].clone()
    while len(chosen) < k:
        closest[chosen] = torch.inf
        chosen.append(int(closest.argmin()))
        closest = torch.maximum(closest, cosine[chosen[-1]])
    return torch.tensor(chosen)


def ours(features: Tensor, k: int) -> Tensor:
    """The same signature. One op call instead of some hundred; on a GPU it would not wait for the device either."""
    indices, _ = tp.repulsion_sample(features.unsqueeze(0), k, first="isolated")
    return indices[0]


library = SimpleNamespace(select_tokens=loop_of_the_library)


def prune(features: Tensor, k: int) -> Tensor:
    """The library's entry point, which looks its selection up when it runs."""
    indices = library.select_tokens(features, k)
    return features[indices.sort().values]


def timed(k: int, features: Tensor) -> tuple[Tensor, float]:
    best, kept = float("inf"), features
    for _ in range(3):
        began = time.perf_counter()
        kept = prune(features, k)
        best = min(best, time.perf_counter() - began)
    return kept, best


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(576, 1024, generator=generator)
    before, slow = timed(128, features)
    library.select_tokens = ours
    after, fast = timed(128, features)
    print(f"same tokens kept: {torch.equal(before, after)}")
    print(f"library {slow * 1e3:.1f} ms, ours {fast * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
