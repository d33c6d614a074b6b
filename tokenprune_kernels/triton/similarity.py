"""Triton kernels of cosine_scores, contrastive_scores and paired_cosine: dot products, divided by the norms afterwards.

Every feature has its cosines with a list of rows for a maximum (the queries, the anchors) and one for a mean (the
queries, the references); the score is the maximum, the mean, or the maximum minus the mean. A list is a tensor of its
own, or rows of the features by index. A program owns BLOCK_N features of a sample. For each BLOCK_L rows of a list it
walks the channels, BLOCK_C at a time, and adds up dot products and the squares of both operands from the same tiles:

    listed   [BLOCK_L, BLOCK_C] --\\-- product --> dots [BLOCK_L, BLOCK_N] --\\
                                   \\- squares --> norms --------------------+--> cosines --> maximum, sum over rows
    features [BLOCK_N, BLOCK_C] ----- squares --> norms --------------------/

One launch, grid (B * ceil(N / BLOCK_N),). Reads the features once for every BLOCK_L rows of a list and the lists once
for every BLOCK_N features (from L2: the lists are short), writes [B, N]. No workspace.

Dividing after the reduction differs from normalising first only where squares overflow: a row of finite elements is
then a unit vector of zeros, and one with NaN or infinite elements makes every cosine NaN. Such rows are read again.

paired_cosine has one dot product per token: a launch over blocks of tokens that reads both lists once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .product import add_product, norm_of_squares
from .runtime import (
    Config,
    batch_stride,
    cdiv,
    check_indices,
    check_not_float64,
    fresh,
    launch,
    mask_rows,
    power_of_two,
    rows,
)


def similarity_config(dtype: torch.dtype, n: int, listed: int, channels: int) -> Config:
    """Blocks for [n, channels] features against lists of up to `listed` rows; they do not depend on the batch size.

    Few 16-bit features at a time while there are few, so that one image of 576 tokens still makes 36 programs. Chunks
    are as long as registers allow: a thread keeps the squares of its elements of both tiles; an address per element
    where rows are not aligned; and in float32, where NVIDIA has no matrix instructions, its rows of both tiles. Other
    combinations of these sizes spill somewhere.
    """
    if dtype == torch.float32:
        return Config({"BLOCK_N": 32, "BLOCK_L": 32, "BLOCK_C": 32}, num_warps=4, num_stages=2)
    block_c = 64 if channels % 16 == 0 else 32
    if n <= 1024:
        return Config({"BLOCK_N": 16, "BLOCK_L": power_of_two(listed, 16, 64), "BLOCK_C": block_c}, 4, 3)
    if listed <= 16:
        return Config({"BLOCK_N": 32, "BLOCK_L": 16, "BLOCK_C": block_c}, 4, 3)
    if n <= 4096:
        return Config({"BLOCK_N": 32, "BLOCK_L": 64, "BLOCK_C": block_c}, 4, 3)
    return Config({"BLOCK_N": 64, "BLOCK_L": 64, "BLOCK_C": block_c}, 8, 3)


@triton.jit
def _inverse_norms(squares, rows_ptr, counts, channels, BLOCK_C: tl.constexpr):
    """1 / max(norm, NORM_FLOOR) of rows; 0 where only the squares overflow, NaN for rows with NaN or infinity."""
    odd = (squares == float("inf")) | (squares != squares)
    tainted = tl.full(squares.shape, 0, tl.int32)
    if tl.max(odd.to(tl.int32), 0) > 0:
        for start in range(0, channels, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = counts[:, None] & (column < channels)[None, :]
            x = tl.load(rows_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            tainted = tl.maximum(tainted, tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), 1))
    norm = norm_of_squares(tl.where(odd, 1.0, squares))
    inverse = tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)
    return tl.where(odd, tl.where(tainted > 0, float("nan"), 0.0), inverse)


@triton.jit
def _divided(dots, by_row, by_feature):
    """Cosines. Where squares overflow, so may the dot product: 0 there, or the other vector's NaN."""
    dots = tl.where((by_row == 0) | (by_feature == 0), 0.0, dots)
    return dots * by_feature * by_row


@triton.jit
def cosine_tile(
    listed_ptr, listed, features_ptr, tokens, channels,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_L, BLOCK_N] cosines of rows at `listed_ptr` and `features_ptr`, of which `listed` and `tokens` count."""
    dots = tl.full([BLOCK_L, BLOCK_N], 0.0, tl.float32)
    listed_squares = tl.full([BLOCK_L, BLOCK_C], 0.0, tl.float32)
    feature_squares = tl.full([BLOCK_N, BLOCK_C], 0.0, tl.float32)
    for start in range(0, channels, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = (column < channels)[None, :]
        row = tl.load(listed_ptr[:, None] + column[None, :], mask=listed[:, None] & inside, other=0.0)
        feature = tl.load(features_ptr[:, None] + column[None, :], mask=tokens[:, None] & inside, other=0.0)
        dots = add_product(row, tl.trans(feature), dots)
        row, feature = row.to(tl.float32), feature.to(tl.float32)
        listed_squares += row * row
        feature_squares += feature * feature
    by_row = _inverse_norms(tl.sum(listed_squares, 1), listed_ptr, listed, channels, BLOCK_C)[:, None]
    by_feature = _inverse_norms(tl.sum(feature_squares, 1), features_ptr, tokens, channels, BLOCK_C)[None, :]
    return _divided(dots, by_row, by_feature)


@triton.jit
def similarity_kernel(
    features_ptr, rows_ptr, anchors_ptr, references_ptr, mask_ptr, scores_ptr,
    n, channels, best_length, mean_length, feature_sample_stride, feature_row_stride, row_sample_stride, row_stride,
    anchor_stride, reference_stride, mask_stride,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Maximum over `best_length` listed rows, minus or plus the mean over `mean_length` rows, whose tiles come after.

    With anchors_ptr and references_ptr, these list rows of the n features for the maximum and for the mean. Without,
    all rows are listed (those that mask_ptr marks), and one of the two lengths is 0.
    """
    tiles = (n + BLOCK_N - 1) // BLOCK_N
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = token < n
    features_ptr += sample * feature_sample_stride + tl.where(tokens, token, 0).to(tl.int64) * feature_row_stride
    rows_ptr += sample * row_sample_stride
    if anchors_ptr is not None:
        anchors_ptr += sample * anchor_stride
        references_ptr += sample * reference_stride
    if mask_ptr is not None:
        mask_ptr += sample * mask_stride
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.full([BLOCK_N], 0.0, tl.float32)
    count = 0
    best_tiles = (best_length + BLOCK_L - 1) // BLOCK_L
    for tile in range(best_tiles + (mean_length + BLOCK_L - 1) // BLOCK_L):
        to_best = tile < best_tiles
        entry = tl.where(to_best, tile, tile - best_tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
        listed = entry < tl.where(to_best, best_length, mean_length)
        row = entry.to(tl.int64)
        if anchors_ptr is not None:
            row = tl.load(tl.where(to_best, anchors_ptr, references_ptr) + entry, mask=listed, other=-1)
            listed = listed & (row >= 0) & (row < n)
        if mask_ptr is not None:
            listed = listed & (tl.load(mask_ptr + entry, mask=listed, other=0) != 0)
        listed_ptr = rows_ptr + tl.where(listed, row, 0) * row_stride
        cosine = cosine_tile(listed_ptr, listed, features_ptr, tokens, channels, BLOCK_L, BLOCK_N, BLOCK_C)
        if to_best:
            # No cosine is infinite: inf stands for NaN, which wins over every number, and -inf for an empty list.
            cosine = tl.where(cosine == cosine, cosine, float("inf"))
            best = tl.maximum(best, tl.max(tl.where(listed[:, None], cosine, float("-inf")), 0))
        else:
            total += tl.sum(tl.where(listed[:, None], cosine, 0.0), 0)
            count += tl.sum(listed.to(tl.int32), 0)
    best = tl.where(best == float("-inf"), 0.0, tl.where(best == float("inf"), float("nan"), best))
    mean = tl.div_rn(total, tl.full([BLOCK_N], 1.0, tl.float32) * tl.maximum(count, 1).to(tl.float32))
    score = best + mean
    if anchors_ptr is not None:
        score = best - mean
    tl.store(scores_ptr + sample * n + token, score, mask=tokens)


def cosine_scores(
    features: Tensor, queries: Tensor, *, query_mask: Tensor | None = None, reduction: str = "max"
) -> Tensor:
    scores: Tensor = fresh(_fakes.cosine_scores(features, queries, query_mask=query_mask, reduction=reduction))
    check_not_float64("cosine_scores", features=features)
    features, queries, mask = rows(features), rows(queries), mask_rows(query_mask)
    batch, n, channels = features.shape
    m = queries.shape[1]
    config = similarity_config(features.dtype, n, m, channels)
    launch(
        similarity_kernel, (batch * cdiv(n, config.blocks["BLOCK_N"]),), features,
        features, queries, None, None, mask, scores,
        n, channels, m if reduction == "max" else 0, m if reduction == "mean" else 0,
        *features.stride()[:2], *queries.stride()[:2], 0, 0, batch_stride(mask),
        config=config,
    )  # fmt: skip
    return scores


def contrastive_scores(features: Tensor, anchor_indices: Tensor, reference_indices: Tensor) -> Tensor:
    scores: Tensor = fresh(_fakes.contrastive_scores(features, anchor_indices, reference_indices))
    check_not_float64("contrastive_scores", features=features)
    batch, n, channels = features.shape
    check_indices("contrastive_scores", "anchor_indices", anchor_indices, n)
    check_indices("contrastive_scores", "reference_indices", reference_indices, n)
    features, anchors, references = rows(features), rows(anchor_indices), rows(reference_indices)
    a, r = anchors.shape[1], references.shape[1]
    config = similarity_config(features.dtype, n, a if a > r else r, channels)
    launch(
        similarity_kernel, (batch * cdiv(n, config.blocks["BLOCK_N"]),), features,
        features, features, anchors, references, None, scores,
        n, channels, a, r, *features.stride()[:2], *features.stride()[:2], anchors.stride(0), references.stride(0), 0,
        config=config,
    )  # fmt: skip
    return scores


# --- pairs -----------------------------------------------------------------------------------------------------------


def pairs_config(channels: int) -> Config:
    """Few tokens each, so that many programs read at the same time, and a warp reads at least 256 bytes of a row."""
    return Config({"BLOCK_N": 4, "BLOCK_C": power_of_two(channels, 64, 512)}, num_warps=4, num_stages=2)


@triton.jit
def pairs_kernel(
    a_ptr, b_ptr, scores_ptr, n, channels, a_sample_stride, a_row_stride, b_sample_stride, b_row_stride,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = (n + BLOCK_N - 1) // BLOCK_N
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = token < n
    row = tl.where(tokens, token, 0).to(tl.int64)
    a_ptr += sample * a_sample_stride + row * a_row_stride
    b_ptr += sample * b_sample_stride + row * b_row_stride
    dots = tl.full([BLOCK_N, BLOCK_C], 0.0, tl.float32)
    a_squares = tl.full([BLOCK_N, BLOCK_C], 0.0, tl.float32)
    b_squares = tl.full([BLOCK_N, BLOCK_C], 0.0, tl.float32)
    for start in range(0, channels, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = tokens[:, None] & (column < channels)[None, :]
        a = tl.load(a_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dots += a * b
        a_squares += a * a
        b_squares += b * b
    by_a = _inverse_norms(tl.sum(a_squares, 1), a_ptr, tokens, channels, BLOCK_C)
    by_b = _inverse_norms(tl.sum(b_squares, 1), b_ptr, tokens, channels, BLOCK_C)
    tl.store(scores_ptr + sample * n + token, _divided(tl.sum(dots, 1), by_a, by_b), mask=tokens)


def paired_cosine(a: Tensor, b: Tensor) -> Tensor:
    scores: Tensor = fresh(_fakes.paired_cosine(a, b))
    check_not_float64("paired_cosine", a=a)
    a, b = rows(a), rows(b)
    batch, n, channels = a.shape
    config = pairs_config(channels)
    launch(
        pairs_kernel, (batch * cdiv(n, config.blocks["BLOCK_N"]),), a,
        a, b, scores, n, channels, *a.stride()[:2], *b.stride()[:2],
        config=config,
    )  # fmt: skip
    return scores
