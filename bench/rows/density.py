"""Rows of density_peaks: cdist, topk, a mask of denser tokens, the smallest distance to one."""

from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from testing.gpu_checks import Inputs

from . import Row, Scale, normal, on, short

NEIGHBORS = 5


def published(features: Tensor, k: int) -> Tensor:
    """DPC-kNN as TCFormer has it, without noise and with the centres in ascending order."""
    features = features.float()  # cdist knows no other type on a GPU
    distance = torch.cdist(features, features) / features.shape[-1] ** 0.5
    density = (-distance.topk(NEIGHBORS, dim=-1, largest=False).values.square().mean(-1)).exp()
    denser = (density.unsqueeze(1) > density.unsqueeze(2)).to(distance.dtype)
    largest = distance.flatten(1).amax(-1).view(-1, 1, 1)
    to_denser = (distance * denser + largest * (1 - denser)).amin(-1)
    return (to_denser * density).topk(k, dim=-1).indices.sort(-1).values


def agree(got: Tensor, ours: Tensor) -> None:
    """The same centres but for near ties, which rounding decides: 1 of 20."""
    assert len(set(got[0].tolist()) & set(ours[0].tolist())) >= 0.95 * ours.shape[1]


def peaks(n: int, channels: int, k: int, dtype: torch.dtype = torch.float32, **more: Any) -> Row:
    """Clusters of tokens, as images have them."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = torch.Generator().manual_seed(seed)
        member, spread = torch.randint(0, k, (n,), generator=draw), torch.rand(n, 1, generator=draw)
        features = normal(seed, k, channels)[member] + normal(seed + 1000, n, channels) * spread
        return on(device, {"features": features[None].to(dtype)})

    def check(x: Inputs, ours: Any) -> dict[str, float]:
        want = tp.reference.density_peaks(x["features"], k)[0]
        agree(want, ours)
        return {"other centres": float(len(set(ours[0].tolist()) - set(want[0].tolist())))}

    return Row(
        f"density_peaks {n}x{channels} K{k}" + ("" if dtype == torch.float32 else f" {short(dtype)}"),
        ("density_peaks",),
        make,
        lambda x: tp.density_peaks(x["features"], k)[0],
        check,
        {
            "cdist and topk": lambda x: published(x["features"], k),
            "product of all pairs alone": lambda x: x["features"] @ x["features"].mT,
        },
        unlike=("product of all pairs alone",),
        targets={"cdist and topk": 3.0} if n == 576 else {},
        bytes=n * channels * dtype.itemsize + 8 * k,
        flops=1.0 * n * n * channels,  # each pair once
        dtype=dtype,
        agree=agree,
        seconds=2.0,
        note="half of the product of all pairs is needed, which bounds what float32 can reach",
        **more,
    )


def gpu_rows(scale: Scale) -> list[Row]:
    llava, next_ = scale.model("LLaVA-1.5-7B"), scale.model("LLaVA-NeXT-7B")
    return [
        peaks(model.tokens, model.hidden, scale(k, 8), dtype, max_launches=4)
        for model, k in ((llava, 64), (next_, 320))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def cpu_rows() -> list[Row]:
    # The last is beyond the size up to which all distances are stored: the others are made twice instead of once.
    return [
        peaks(*size)
        for size in ((576, 4096, 64), (576, 1024, 64), (2880, 1024, 320), (5000, 256, 320), (6000, 256, 320))
    ]
