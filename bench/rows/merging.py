"""Rows of merge_tokens: normalise, a matrix product, argmax, and a product with a one-hot matrix."""

from typing import Any

import torch

import tokenprune_kernels as tp
from testing.gpu_checks import Inputs

from . import Check, Row, Scale, against, normal, on, short

FLOAT, BRAIN = torch.float32, torch.bfloat16
USUAL = "normalise, product, argmax, one-hot"


def usual(x: Inputs) -> Any:
    """In float32, as the means are; the product sums in its own order."""
    values, targets = x["values"], x["targets"]
    unit = torch.nn.functional.normalize(x["keys"].float(), dim=-1)
    joined = (unit @ unit.take_along_dim(targets.unsqueeze(-1), 1).mT).argmax(-1)
    joined.scatter_(1, targets, torch.arange(targets.shape[1], device=targets.device).expand_as(targets))
    member = torch.nn.functional.one_hot(joined, targets.shape[1]).float()
    sizes = member.sum(1)
    return ((member.mT @ values.float()) / sizes.unsqueeze(-1)).to(values.dtype), sizes, joined


def agree(got: Any, ours: Any) -> None:
    """Means to rounding, who joined whom but for near ties: 1 of 1000 tokens."""
    differ = got[2] != ours[2]
    assert int(differ.sum()) <= differ.numel() / 1000
    agreed = torch.ones_like(ours[1], dtype=torch.bool)
    for joined in (got[2], ours[2]):
        agreed[0, joined[differ]] = False
    assert torch.equal(got[1][agreed], ours[1][agreed])
    torch.testing.assert_close(got[0][agreed], ours[0][agreed], rtol=2e-2, atol=2e-5)


def merge(n: int, width: int, k: int, of_keys: int, dtype: torch.dtype, check: Check | None = None, **more: Any) -> Row:
    def make(device: torch.device, seed: int) -> Inputs:
        values = normal(seed, 1, n, width, dtype=dtype)
        keys = values if of_keys == width else normal(seed + 1000, 1, n, of_keys, dtype=dtype)
        targets = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values[None]
        return on(device, {"values": values, "keys": keys, "targets": targets})

    return Row(
        f"merge_tokens {n}x{width} to {k}, keys of {of_keys}, {short(dtype)}",
        ("merge_tokens",),
        make,
        lambda x: tp.merge_tokens(**x),
        check or against(lambda x: tp.reference.merge_tokens(**x), 2e-3),
        {USUAL: usual},
        targets={USUAL: 3.0},
        bytes=(n * (width + of_keys) + k * width) * dtype.itemsize + 8 * n,
        flops=2.0 * n * k * of_keys,
        dtype=dtype,
        agree=agree,
        **more,
    )


def like_reference(x: Inputs, ours: Any) -> dict[str, float]:
    """A near tie may fall either way, so that means are compared where both had the same tokens."""
    want = tp.reference.merge_tokens(**x)
    agree(ours, want)
    return {"differently assigned": float((ours[2] != want[2]).sum())}


def gpu_rows(scale: Scale) -> list[Row]:
    llava, next_ = scale.model("LLaVA-1.5-7B"), scale.model("LLaVA-NeXT-7B")
    sizes = [(llava.tokens, llava.vision_hidden, scale(64, 6), llava.vision_hidden),
             (next_.tokens, next_.hidden, scale(320, 12), scale(128, 16))]  # fmt: skip
    return [merge(*size, BRAIN, max_launches=3, check=like_reference) for size in sizes]


def cpu_rows() -> list[Row]:
    sizes = [(576, 1024, 64, 1024), (576, 4096, 54, 64), (2880, 4096, 320, 128)]
    return [merge(*size, dtype) for size in sizes for dtype in (FLOAT, BRAIN)]
