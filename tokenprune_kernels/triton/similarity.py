"""Triton kernel of cosine_scores and contrastive_scores: tiles of dot products, divided by the norms afterwards.

Every feature meets a list of rows for a maximum of cosines (the queries, the anchors) and one for a mean (the queries,
the references); the score is the maximum, the mean, or the maximum minus the mean. A list is a tensor of its own, or
rows of the features by index. A program owns BLOCK_N features of a sample. For each BLOCK_L rows of a list it walks the
channels, BLOCK_C at a time, and adds up dot products and the squares of both operands from the same tiles:

    listed   [BLOCK_L, BLOCK_C] --\\-- tl.dot --> dots [BLOCK_L, BLOCK_N] --\\
                                   \\- squares --> norms --------------------+--> cosines --> maximum, sum over rows
    features [BLOCK_N, BLOCK_C] ----- squares --> norms --------------------/

One launch, grid (B * ceil(N / BLOCK_N),). Reads the features once for every BLOCK_L rows of a list and the lists once
for every BLOCK_N features (from L2: the lists are short), writes [B, N]. No workspace.

Dividing after the reduction differs from normalising first only where squares overflow: a row of finite elements is
then a unit vector of zeros, and one with NaN or infinite elements makes every cosine NaN. Such rows are read again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .runtime import Config, cdiv, check_indices, check_not_float64, fresh, launch, mask_rows, power_of_two, rows


def similarity_config(dtype: torch.dtype, n: int, listed: int, channels: int) -> Config:
    """Blocks for [n, channels] features against lists of up to `listed` rows; the batch size has no say.

    Few features at a time while there are few, so that one image of 576 tokens still makes 36 programs. 16-bit rows
    are read 256 bytes at a time. float32 takes shorter chunks: where there are no float32 matrix instructions, a thread
    holds its rows of both tiles in registers.
    """
    block_n = 16 if n <= 1024 else 32 if n <= 4096 else 64
    block_l = power_of_two(listed, 16, 64)
    if dtype == torch.float32:
        return Config({"BLOCK_N": block_n, "BLOCK_L": block_l, "BLOCK_C": power_of_two(channels, 16, 32)}, 4, 2)
    block_c = power_of_two(channels, 16, 128 if block_n + block_l <= 96 else 64)
    return Config({"BLOCK_N": block_n, "BLOCK_L": block_l, "BLOCK_C": block_c}, 4, 3)


@triton.jit
def _inverse_norms(squares, rows_ptr, counts, channels, BLOCK_C: tl.constexpr):
    """1 / max(norm, 1e-12) of rows; 0 where only the squares overflow, NaN for rows with NaN or infinite elements."""
    odd = (squares == float("inf")) | (squares != squares)
    tainted = tl.zeros_like(squares).to(tl.int32)
    if tl.max(odd.to(tl.int32), 0) > 0:
        for start in range(0, channels, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = counts[:, None] & (column < channels)[None, :]
            x = tl.load(rows_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            tainted = tl.maximum(tainted, tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), 1))
    norm = tl.sqrt_rn(tl.where(odd, 1.0, squares))
    inverse = tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), tl.where(norm < 1e-12, 1e-12, norm))
    return tl.where(odd, tl.where(tainted > 0, float("nan"), 0.0), inverse)


@triton.jit
def _cosines(
    listed_ptr, listed, features_ptr, tokens, channels,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_L, BLOCK_N] cosines of rows at `listed_ptr` and `features_ptr`, of which `listed` and `tokens` count."""
    dots = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    ones = tl.full([BLOCK_L, BLOCK_N], 1.0, tl.float32)
    listed_squares = tl.zeros([BLOCK_L], tl.float32)
    feature_squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, channels, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = (column < channels)[None, :]
        row = tl.load(listed_ptr[:, None] + column[None, :], mask=listed[:, None] & inside, other=0.0)
        feature = tl.load(features_ptr[:, None] + column[None, :], mask=tokens[:, None] & inside, other=0.0)
        # Tensor cores round every addition towards zero: over 8192 channels that is an error of many units in the last
        # place, always in the same direction. So a chunk starts at zero and is added by the ordinary units; an fma and
        # not a sum, which Triton would make the accumulator of the dot product again.
        dots = tl.fma(tl.dot(row, tl.trans(feature), input_precision="ieee"), ones, dots)
        row, feature = row.to(tl.float32), feature.to(tl.float32)
        listed_squares += tl.sum(row * row, 1)
        feature_squares += tl.sum(feature * feature, 1)
    by_row = _inverse_norms(listed_squares, listed_ptr, listed, channels, BLOCK_C)[:, None]
    by_feature = _inverse_norms(feature_squares, features_ptr, tokens, channels, BLOCK_C)[None, :]
    # Where squares overflow, so may the dot product: 0 there, or the other vector's NaN.
    dots = tl.where((by_row == 0) | (by_feature == 0), 0.0, dots)
    return dots * by_feature * by_row


@triton.jit
def _list_tile(
    rows_ptr, indices_ptr, mask_ptr, start, length, available, row_stride, BLOCK_L: tl.constexpr
):  # fmt: skip
    """Pointers to BLOCK_L rows of a sample's list, and which of them count."""
    entry = start + tl.arange(0, BLOCK_L)
    counts = entry < length
    if mask_ptr is not None:
        counts = counts & (tl.load(mask_ptr + entry, mask=counts, other=0) != 0)
    row = entry.to(tl.int64)
    if indices_ptr is not None:
        row = tl.load(indices_ptr + entry, mask=counts, other=-1)
        counts = counts & (row >= 0) & (row < available)
    return rows_ptr + tl.where(counts, row, 0) * row_stride, counts


@triton.jit
def similarity_kernel(
    features_ptr, scores_ptr, n, channels, feature_sample_stride, feature_row_stride,
    best_ptr, best_indices_ptr, best_mask_ptr, best_length, best_sample_stride, best_row_stride, best_list_stride,
    mean_ptr, mean_indices_ptr, mean_mask_ptr, mean_length, mean_sample_stride, mean_row_stride, mean_list_stride,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """scores = maximum over the list `best` minus mean over the list `mean`; with `mean` alone, its mean.

    list_stride: from one sample to the next of the indices, or of the mask.
    """
    tiles = (n + BLOCK_N - 1) // BLOCK_N
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = token < n
    features_ptr += sample * feature_sample_stride
    feature = features_ptr + tl.where(tokens, token, 0).to(tl.int64) * feature_row_stride
    score = tl.zeros([BLOCK_N], tl.float32)
    if best_ptr is not None:
        best_ptr += sample * best_sample_stride
        if best_indices_ptr is not None:
            best_indices_ptr += sample * best_list_stride
        if best_mask_ptr is not None:
            best_mask_ptr += sample * best_list_stride
        best = tl.full([BLOCK_N], float("-inf"), tl.float32)
        unknown = tl.zeros([BLOCK_N], tl.int32)
        for start in range(0, best_length, BLOCK_L):
            listed_ptr, listed = _list_tile(
                best_ptr, best_indices_ptr, best_mask_ptr, start, best_length, n, best_row_stride, BLOCK_L
            )
            cosine = _cosines(listed_ptr, listed, feature, tokens, channels, BLOCK_L, BLOCK_N, BLOCK_C)
            unknown = tl.maximum(unknown, tl.max((listed[:, None] & (cosine != cosine)).to(tl.int32), 0))
            number = listed[:, None] & (cosine == cosine)
            best = tl.maximum(best, tl.max(tl.where(number, cosine, float("-inf")), 0))
        # No cosine is -inf: it stands for an empty list.
        score = tl.where(unknown > 0, float("nan"), tl.where(best == float("-inf"), 0.0, best))
    if mean_ptr is not None:
        mean_ptr += sample * mean_sample_stride
        if mean_indices_ptr is not None:
            mean_indices_ptr += sample * mean_list_stride
        if mean_mask_ptr is not None:
            mean_mask_ptr += sample * mean_list_stride
        total = tl.zeros([BLOCK_N], tl.float32)
        count = 0
        for start in range(0, mean_length, BLOCK_L):
            listed_ptr, listed = _list_tile(
                mean_ptr, mean_indices_ptr, mean_mask_ptr, start, mean_length, n, mean_row_stride, BLOCK_L
            )
            cosine = _cosines(listed_ptr, listed, feature, tokens, channels, BLOCK_L, BLOCK_N, BLOCK_C)
            total += tl.sum(tl.where(listed[:, None], cosine, 0.0), 0)
            count += tl.sum(listed.to(tl.int32), 0)
        mean = tl.div_rn(total, tl.full([BLOCK_N], 1.0, tl.float32) * tl.maximum(count, 1).to(tl.float32))
        if best_ptr is not None:
            score = score - mean
        else:
            score = mean
    tl.store(scores_ptr + sample * n + token, score, mask=tokens)


def _list_arguments(listed: Tensor, indices: Tensor | None, mask: Tensor | None, length: int) -> tuple[object, ...]:
    beside = indices if indices is not None else mask
    stride = 0 if beside is None else beside.stride(0)
    return listed, indices, mask, length, listed.stride(0), listed.stride(1), stride


_NO_LIST = (None, None, None, 0, 0, 0, 0)


def cosine_scores(
    features: Tensor, queries: Tensor, *, query_mask: Tensor | None = None, reduction: str = "max"
) -> Tensor:
    scores: Tensor = fresh(_fakes.cosine_scores(features, queries, query_mask=query_mask, reduction=reduction))
    check_not_float64("cosine_scores", features=features)
    features, queries, mask = rows(features), rows(queries), mask_rows(query_mask)
    batch, n, channels = features.shape
    config = similarity_config(features.dtype, n, queries.shape[1], channels)
    listed = _list_arguments(queries, None, mask, queries.shape[1])
    lists = (*listed, *_NO_LIST) if reduction == "max" else (*_NO_LIST, *listed)
    launch(
        similarity_kernel, (batch * cdiv(n, config.blocks["BLOCK_N"]),), features,
        features, scores, n, channels, features.stride(0), features.stride(1), *lists,
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
        features, scores, n, channels, features.stride(0), features.stride(1),
        *_list_arguments(features, anchors, None, a), *_list_arguments(features, references, None, r),
        config=config,
    )  # fmt: skip
    return scores
