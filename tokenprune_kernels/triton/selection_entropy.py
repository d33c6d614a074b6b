"""score_entropy: the entropy of a score vector, one program per sample.

Grid B; scores and mask are read twice (the second time from cache), one float is written.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .runtime import Config, batch_stride, check_not_float64, fresh, launch, mask_rows, power_of_two, rows


def score_config(n: int) -> Config:
    """One block of scores at a time: all of a LLaVA image in one, long sequences in a loop."""
    block = power_of_two(n, 128, 4096)
    return Config({"BLOCK_N": block}, num_warps=4 if block <= 1024 else 8)


@triton.jit
def _masses(scores_ptr, mask_ptr, start, n, BLOCK_N: tl.constexpr):
    """max(s, 0) of the valid tokens of a block as float32, NaN as 0, and which tokens count."""
    offset = start + tl.arange(0, BLOCK_N).to(tl.int64)
    inside = offset < n
    counts = inside
    if mask_ptr is not None:
        counts = inside & (tl.load(mask_ptr + offset, mask=inside, other=0) != 0)
    score = tl.load(scores_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return tl.where(counts & (score > 0), score, 0.0), counts


@triton.jit
def score_entropy_kernel(
    scores_ptr, mask_ptr, entropy_ptr, n, score_stride, mask_stride, NORMALIZED: tl.constexpr, BLOCK_N: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    scores_ptr += sample * score_stride
    if mask_ptr is not None:
        mask_ptr += sample * mask_stride
    total = 0.0
    tokens = 0
    for start in range(0, n, BLOCK_N):
        mass, counts = _masses(scores_ptr, mask_ptr, start, n, BLOCK_N)
        total += tl.sum(mass, 0)
        tokens += tl.sum(counts.to(tl.int32), 0)
    entropy = 0.0
    for start in range(0, n, BLOCK_N):
        mass, counts = _masses(scores_ptr, mask_ptr, start, n, BLOCK_N)
        p = mass / total
        entropy -= tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), tl.where(p != p, p, 0.0)), 0)
    uniform = tl.log(tl.maximum(tokens, 1).to(tl.float32))
    entropy = tl.where(total > 0, entropy, uniform)  # an all-zero row counts as uniform
    if NORMALIZED:
        share = entropy / tl.where(tokens > 1, uniform, 1.0)
        entropy = tl.where(share < 0, 0.0, tl.where(share > 1, 1.0, share))  # comparisons let NaN through
    tl.store(entropy_ptr + sample, tl.where(tokens <= 1, 0.0, entropy))


def score_entropy(scores: Tensor, *, mask: Tensor | None = None, normalized: bool = True) -> Tensor:
    entropy: Tensor = fresh(_fakes.score_entropy(scores, mask=mask, normalized=normalized))
    check_not_float64("score_entropy", scores=scores)
    scores, mask = rows(scores), mask_rows(mask)
    batch, n = scores.shape
    launch(
        score_entropy_kernel, (batch,), scores,
        scores, mask, entropy, n, scores.stride(0), batch_stride(mask),
        config=score_config(n), NORMALIZED=normalized,
    )  # fmt: skip
    return entropy
