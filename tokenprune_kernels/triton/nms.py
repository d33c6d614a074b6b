"""spatial_semantic_nms in Triton: a step is one reduction over keys, and a weight for every token near the pick.

Up to gram.GRAM_TOKENS tokens all inner products are stored (gram.py) and one program per sample makes all picks, with
scores, coordinates and groups in its registers. Above that every step is a launch, as in repulsion_steps.py: the
programs own a block of tokens each, agree on the pick from the candidates that the launch before left, and compute
inner products only where one of their tokens is near the pick.

launch                grid              reads                                      writes
gram_kernel, inverse_norms_kernel       see gram.py
nms_kernel            B                 a row of inner products per step           everything
nms_begin_kernel      B * token blocks  scores, mask                               float32 scores, candidates, padding
nms_step_kernel, k *  B * token blocks  candidates, scores; features near the pick  scores, candidates, the pick
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .gram import (
    best_block,
    best_of_blocks,
    cosine_of,
    gram,
    gram_pitch,
    inverse_norms,
    row_config,
    row_dots,
    samples_at_once,
    stores_gram,
)
from .order import best_candidate, index_of
from .runtime import (
    Config,
    batch_stride,
    cdiv,
    check_not_float64,
    float32,
    fresh,
    launch,
    mask_rows,
    power_of_two,
    rows,
    target,
    workspace,
)


def nms_config(n: int) -> Config:
    """All tokens in the registers of one program: score, coordinates, group and norm of each."""
    block = power_of_two(n, 64, 4096)
    return Config({"BLOCK_N": block}, num_warps=1 if block <= 128 else 4 if block <= 1024 else block // 256)


@triton.jit
def coordinates(positions_ptr, token_stride, token, inside):
    """The position of tokens on the grid of patches, which has two axes."""
    x = tl.load(positions_ptr + token * token_stride, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(positions_ptr + token * token_stride + 1, mask=inside, other=0.0).to(tl.float32)
    return x, y


@triton.jit
def squared_distance(x, y, positions_ptr, token_stride, pick):
    """From tokens at these coordinates to the token `pick`."""
    dx = x - tl.load(positions_ptr + pick * token_stride).to(tl.float32)
    dy = y - tl.load(positions_ptr + pick * token_stride + 1).to(tl.float32)
    return dx * dx + dy * dy


@triton.jit
def suppression(cosine, squared, two_spatial2, two_semantic2):
    """The weight w of a pick for tokens at these cosines and squared distances."""
    gap = 1 - cosine
    return tl.exp(tl.div_rn(-squared, two_spatial2)) * tl.exp(tl.div_rn(-(gap * gap), two_semantic2))


@triton.jit
def nms_kernel(
    dots_ptr, inverse_ptr, scores_ptr, positions_ptr, groups_ptr, mask_ptr, indices_ptr, selected_ptr, counts_ptr,
    n, pitch, steps, k, scores_batch, positions_batch, positions_token, groups_batch, mask_batch,
    radius, two_spatial2, two_semantic2, threshold, HARD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_N)
    inside = token < n
    dots_ptr += sample * n * pitch
    inverse_ptr += sample * n
    positions_ptr += sample * positions_batch
    indices_ptr += sample * k
    selected_ptr += sample * k
    available = inside
    if mask_ptr is not None:
        available = inside & (tl.load(mask_ptr + sample * mask_batch + token, mask=inside, other=0) != 0)
    score = tl.load(scores_ptr + sample * scores_batch + token, mask=inside, other=0.0).to(tl.float32)
    x, y = coordinates(positions_ptr, positions_token, token, inside)
    if groups_ptr is not None:
        groups_ptr += sample * groups_batch
        group = tl.load(groups_ptr + token, mask=inside, other=0)
    own = tl.load(inverse_ptr + token, mask=inside, other=0.0)

    count = 0
    for step in range(steps):
        best = best_candidate(score, available, token, True)
        pick = index_of(best)
        tl.store(indices_ptr + step, pick)
        tl.store(selected_ptr + step, tl.sum(tl.where(token == pick, score, 0.0), 0))
        count += (pick >= 0).to(tl.int32)
        available = available & (token != pick)
        chosen = tl.maximum(pick, 0)  # nothing is available any more where there was no pick
        squared = squared_distance(x, y, positions_ptr, positions_token, chosen)
        near = available & (tl.sqrt_rn(squared) <= radius)
        if groups_ptr is not None:
            near = near & (group == tl.load(groups_ptr + chosen))
        dots = tl.load(dots_ptr + chosen * pitch + token, mask=near, other=0.0)
        weight = suppression(cosine_of(dots, tl.load(inverse_ptr + chosen), own), squared, two_spatial2, two_semantic2)
        if HARD:
            available = available & ~(near & (weight >= threshold))
        else:
            score = tl.where(near, score * (1 - weight), score)
    for start in range(steps, k, BLOCK_N):
        slot = start + token
        tl.store(indices_ptr + slot, tl.full([BLOCK_N], -1, tl.int64), mask=slot < k)
        tl.store(selected_ptr + slot, tl.zeros([BLOCK_N], tl.float32), mask=slot < k)
    tl.store(counts_ptr + sample, count)


@triton.jit
def nms_begin_kernel(
    scores_ptr, mask_ptr, score_ptr, available_ptr, best_ptr, indices_ptr, selected_ptr, counts_ptr,
    n, blocks, k, scores_batch, mask_batch, BLOCK_T: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    token = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < n
    available = inside
    if mask_ptr is not None:
        available = inside & (tl.load(mask_ptr + sample * mask_batch + token, mask=inside, other=0) != 0)
    score = tl.load(scores_ptr + sample * scores_batch + token, mask=inside, other=0.0).to(tl.float32)
    tl.store(score_ptr + sample * n + token, score, mask=inside)
    tl.store(available_ptr + sample * n + token, available.to(tl.uint8), mask=inside)
    best = best_candidate(score, available, token, True)
    tl.store(best_ptr + sample * 2 * blocks + block, best)
    for start in range(block * BLOCK_T, k, blocks * BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)
        tl.store(indices_ptr + sample * k + slot, tl.full([BLOCK_T], -1, tl.int64), mask=slot < k)
        tl.store(selected_ptr + sample * k + slot, tl.zeros([BLOCK_T], tl.float32), mask=slot < k)
    if block == 0:
        tl.store(counts_ptr + sample, sample * 0)


@triton.jit(do_not_specialize=["step"])
def nms_step_kernel(
    features_ptr, inverse_ptr, positions_ptr, groups_ptr, score_ptr, available_ptr, best_ptr,
    indices_ptr, selected_ptr, counts_ptr,
    step, steps, n, channels, blocks, k, features_batch, row_stride, positions_batch, positions_token, groups_batch,
    radius, two_spatial2, two_semantic2, threshold, HARD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    best_ptr += sample * 2 * blocks
    pick = index_of(best_of_blocks(best_ptr + (step % 2) * blocks, blocks, BLOCK_B))
    best_ptr += (1 - step % 2) * blocks + block
    token = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < n
    score_ptr += sample * n
    available_ptr += sample * n
    score = tl.load(score_ptr + token, mask=inside, other=0.0)
    available = (tl.load(available_ptr + token, mask=inside, other=0) != 0) & (token != pick)
    if (pick >= block * BLOCK_T) & (pick < (block + 1) * BLOCK_T):  # only its owner may read the score
        tl.store(indices_ptr + sample * k + step, pick)
        tl.store(selected_ptr + sample * k + step, tl.sum(tl.where(token == pick, score, 0.0), 0))
        tl.store(counts_ptr + sample, (step + 1).to(tl.int64))
    chosen = tl.maximum(pick, 0)
    positions_ptr += sample * positions_batch
    x, y = coordinates(positions_ptr, positions_token, token, inside)
    squared = squared_distance(x, y, positions_ptr, positions_token, chosen)
    near = available & (tl.sqrt_rn(squared) <= radius)
    if groups_ptr is not None:
        groups_ptr += sample * groups_batch
        near = near & (tl.load(groups_ptr + token, mask=inside, other=0) == tl.load(groups_ptr + chosen))
    if (tl.max(near.to(tl.int32), 0) > 0) & (step + 1 < steps):
        inverse_ptr += sample * n
        dots = row_dots(
            features_ptr + sample * features_batch, token, near, chosen, channels, row_stride, BLOCK_T, BLOCK_C
        )
        own = tl.load(inverse_ptr + token, mask=near, other=0.0)
        weight = suppression(cosine_of(dots, tl.load(inverse_ptr + chosen), own), squared, two_spatial2, two_semantic2)
        if HARD:
            available = available & ~(near & (weight >= threshold))
        else:
            score = tl.where(near, score * (1 - weight), score)
    # Several threads may hold the same token: all of them must have read it before one overwrites it.
    tl.debug_barrier()
    tl.store(score_ptr + token, score, mask=inside)
    tl.store(available_ptr + token, available.to(tl.uint8), mask=inside)
    tl.store(best_ptr, best_candidate(score, available, token, True))


def _by_gram(tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...], hard: bool) -> None:
    scores, features, positions, groups, mask, indices, selected, counts = tensors
    assert scores is not None
    assert features is not None
    assert positions is not None
    assert indices is not None
    n, k = scores.shape[1], indices.shape[1]
    dots, inverse = gram(features)
    launch(
        nms_kernel, (scores.shape[0],), scores,
        dots, inverse, scores, positions, groups, mask, indices, selected, counts,
        n, gram_pitch(n), min(k, n), k, scores.stride(0), positions.stride(0), positions.stride(1),
        batch_stride(groups), batch_stride(mask), *numbers,
        config=nms_config(n), HARD=hard,
    )  # fmt: skip


def _in_steps(
    scores: Tensor, features: Tensor, positions: Tensor, groups: Tensor | None, mask: Tensor | None,
    indices: Tensor, selected: Tensor, counts: Tensor, numbers: tuple[float, ...], hard: bool,
) -> None:  # fmt: skip
    batch, n, channels = features.shape
    k = indices.shape[1]
    config = row_config(target(features.device), features.element_size(), channels)
    blocks = cdiv(n, config.blocks["BLOCK_T"])
    inverse, score = inverse_norms(features, config), workspace(scores, (batch, n))
    available = workspace(scores, (batch, n), torch.uint8)
    best = workspace(scores, (batch, 2, blocks), torch.int64)
    launch(
        nms_begin_kernel, (batch * blocks,), scores,
        scores, mask, score, available, best, indices, selected, counts,
        n, blocks, k, scores.stride(0), batch_stride(mask),
        config=Config({"BLOCK_T": config.blocks["BLOCK_T"]}, num_warps=1),
    )  # fmt: skip
    step = 0
    while step < k and step < n:
        launch(
            nms_step_kernel, (batch * blocks,), scores,
            features, inverse, positions, groups, score, available, best, indices, selected, counts,
            step, min(k, n), n, channels, blocks, k, features.stride(0), features.stride(1),
            positions.stride(0), positions.stride(1), batch_stride(groups), *numbers,
            config=config, BLOCK_B=best_block(blocks), HARD=hard,
        )  # fmt: skip
        step += 1


def spatial_semantic_nms(
    scores: Tensor,
    features: Tensor,
    positions: Tensor,
    k: int,
    *,
    groups: Tensor | None = None,
    mask: Tensor | None = None,
    radius: float = 5.0,
    sigma_spatial: float = 1.5,
    sigma_semantic: float = 0.05,
    mode: str = "soft",
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    indices, selected, counts = fresh(
        *_fakes.spatial_semantic_nms(
            scores, features, positions, k, groups=groups, mask=mask, radius=radius, sigma_spatial=sigma_spatial,
            sigma_semantic=sigma_semantic, mode=mode, threshold=threshold,
        )
    )  # fmt: skip
    check_not_float64("spatial_semantic_nms", scores=scores, features=features, positions=positions)
    numbers = (
        float32(radius), float32(2 * sigma_spatial * sigma_spatial), float32(2 * sigma_semantic * sigma_semantic),
        float32(threshold),
    )  # fmt: skip
    scores, features, positions = rows(scores), rows(features), rows(positions)
    groups, mask = rows(groups), mask_rows(mask)
    batch, n = scores.shape
    if not stores_gram(n):
        _in_steps(scores, features, positions, groups, mask, indices, selected, counts, numbers, mode == "hard")
        return indices, selected, counts
    tensors = (scores, features, positions, groups, mask, indices, selected, counts)
    begin, group = 0, samples_at_once(n)
    if batch <= group:
        _by_gram(tensors, numbers, mode == "hard")
        return indices, selected, counts
    while begin < batch:
        end = min(begin + group, batch)
        _by_gram(tuple(None if t is None else t[begin:end] for t in tensors), numbers, mode == "hard")
        begin += group
    return indices, selected, counts
