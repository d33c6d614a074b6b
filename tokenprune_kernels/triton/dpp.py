"""dpp_sample: all inner products in one launch, then one program per sample makes all picks.

A step reads the pick's row of inner products and the rows of the Cholesky factor so far, each once, and writes one row:
k^2 N / 2 floats for k picks, which stay in L2. Gains (d2) and what is still free are in memory too, so that a sample
may be longer than a block.

launch      grid          reads                                       writes
gram_kernel see gram.py
dpp_kernel  B             per step a row of inner products, the       indices, gains, counts; per step a row of the
                          factor, gains                               factor
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .gram import cosine_of, gram, gram_pitch, samples_at_once
from .order import best_candidate, index_of
from .radix import check_tokens
from .runtime import (
    Config,
    batch_stride,
    check_not_float64,
    float32,
    fresh,
    launch,
    mask_rows,
    power_of_two,
    rows,
    workspace,
)


def dpp_config(n: int) -> Config:
    block = power_of_two(n, 64, 4096)
    return Config({"BLOCK_N": block}, num_warps=1 if block <= 128 else 4 if block <= 1024 else 8)


@triton.jit
def _quality(quality_ptr, token, inside):
    quality = tl.full(token.shape, 1.0, tl.float32)
    if quality_ptr is not None:
        quality = tl.load(quality_ptr + token, mask=inside, other=0.0).to(tl.float32)
    return quality


@triton.jit
def dpp_kernel(
    dots_ptr, inverse_ptr, quality_ptr, mask_ptr, factor_ptr, d2_ptr, free_ptr, indices_ptr, gains_ptr, counts_ptr,
    n, pitch, steps, k, quality_stride, mask_stride, epsilon, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    dots_ptr += sample * n * pitch
    inverse_ptr += sample * n
    factor_ptr += sample * steps * n
    d2_ptr += sample * n
    free_ptr += sample * n
    indices_ptr += sample * k
    gains_ptr += sample * k
    if quality_ptr is not None:
        quality_ptr += sample * quality_stride
    best = tl.full([], 0, tl.int64)
    for first in range(0, n, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = token < n
        free = inside
        if mask_ptr is not None:
            free = inside & (tl.load(mask_ptr + sample * mask_stride + token, mask=inside, other=0) != 0)
        own = tl.load(inverse_ptr + token, mask=inside, other=0.0)
        q = _quality(quality_ptr, token, inside)
        d2 = q * q * cosine_of(tl.load(dots_ptr + token * pitch + token, mask=inside, other=0.0), own, own)
        d2 = tl.where(tl.abs(q) < float("inf"), d2, float("nan"))  # a NaN is not smaller either
        tl.store(d2_ptr + token, d2, mask=inside)
        tl.store(free_ptr + token, free.to(tl.uint8), mask=inside)
        best = tl.maximum(best, best_candidate(d2, free, token, True))
    count = tl.full([], 0, tl.int32)
    rank = 0  # picks that changed something: rows of the factor,
    next_ptr = factor_ptr  # and where the next one goes
    for step in range(steps):
        tl.debug_barrier()  # gains and the factor are read by other threads than wrote them
        pick = index_of(best)
        j = tl.maximum(pick, 0)
        gain = tl.load(d2_ptr + j)
        picked = pick >= 0
        tl.store(indices_ptr + step, pick)
        tl.store(gains_ptr + step, tl.where(picked, gain, 0.0))
        count += picked.to(tl.int32)
        q_j = 1.0
        if quality_ptr is not None:
            q_j = tl.load(quality_ptr + j).to(tl.float32)
        # Beyond the rank of the kernel a gain is a rounding error, which nothing may be divided by.
        grows = picked & (gain > epsilon * (q_j * q_j))
        by_pick = tl.load(inverse_ptr + j)
        tl.debug_barrier()  # all threads have the gain before it changes
        best = tl.full([], 0, tl.int64)
        for first in range(0, n, BLOCK_N):
            token = first + tl.arange(0, BLOCK_N).to(tl.int64)
            inside = token < n
            d2 = tl.load(d2_ptr + token, mask=inside, other=0.0)
            free = (tl.load(free_ptr + token, mask=inside, other=0) != 0) & (token != pick)
            if grows:
                own = tl.load(inverse_ptr + token, mask=inside, other=0.0)
                row = tl.load(dots_ptr + j * pitch + token, mask=inside, other=0.0)
                row = _quality(quality_ptr, token, inside) * q_j * cosine_of(row, by_pick, own)
                known = tl.zeros([BLOCK_N], tl.float32)
                at = factor_ptr
                for _ in range(rank):
                    known += tl.load(at + j) * tl.load(at + token, mask=inside, other=0.0)
                    at += n
                e = tl.div_rn(row - known, tl.zeros([BLOCK_N], tl.float32) + tl.sqrt_rn(gain))
                tl.store(next_ptr + token, e, mask=inside)
                d2 -= e * e
            tl.debug_barrier()  # several threads may hold the same token: all have read it before one overwrites it
            tl.store(d2_ptr + token, d2, mask=inside)
            tl.store(free_ptr + token, free.to(tl.uint8), mask=inside)
            best = tl.maximum(best, best_candidate(d2, free, token, True))
        rank += grows.to(tl.int32)
        next_ptr += tl.where(grows, n, 0)
    for start in range(steps, k, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N).to(tl.int64)
        tl.store(indices_ptr + slot, tl.full([BLOCK_N], -1, tl.int64), mask=slot < k)
        tl.store(gains_ptr + slot, tl.zeros([BLOCK_N], tl.float32), mask=slot < k)
    tl.store(counts_ptr + sample, count.to(tl.int64))


def _sample(
    features: Tensor, quality: Tensor | None, mask: Tensor | None, epsilon: float,
    indices: Tensor, gains: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    batch, n, _ = features.shape
    k = indices.shape[1]
    steps = min(k, n)
    dots, inverse = gram(features)
    factor, d2 = workspace(features, (batch, steps, n)), workspace(features, (batch, n))
    free = workspace(features, (batch, n), torch.uint8)
    launch(
        dpp_kernel, (batch,), features,
        dots, inverse, quality, mask, factor, d2, free, indices, gains, counts,
        n, gram_pitch(n), steps, k, batch_stride(quality), batch_stride(mask), epsilon, config=dpp_config(n),
    )  # fmt: skip


def dpp_sample(
    features: Tensor, k: int, *, quality: Tensor | None = None, mask: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    indices, gains, counts = fresh(*_fakes.dpp_sample(features, k, quality=quality, mask=mask, epsilon=epsilon))
    check_not_float64("dpp_sample", features=features, quality=quality)
    batch, n, _ = features.shape
    check_tokens("dpp_sample", "features", n)
    features, quality, flags = rows(features), rows(quality), mask_rows(mask)
    begin, group = 0, samples_at_once(n)
    if batch <= group:
        _sample(features, quality, flags, float32(epsilon), indices, gains, counts)
        return indices, gains, counts
    while begin < batch:
        some = slice(begin, min(begin + group, batch))
        of_quality, of_mask = (None if t is None else t[some] for t in (quality, flags))
        _sample(features[some], of_quality, of_mask, float32(epsilon), indices[some], gains[some], counts[some])
        begin += group
    return indices, gains, counts
