"""SparseVLM (arXiv 2410.04417): what the telling words of the question attend to, and a few rows of what is dropped."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._masks import indices_to_mask
from .._op import Budget
from ..ops import cross_attention_scores, density_peaks, gather_compact, mask_to_indices, merge_tokens, select_topk
from ..ops._attention import heads_first
from ._calls import called_like_ops
from ._common import (
    Selection,
    check_count,
    check_ratio,
    check_visual,
    merge_into,
    row_attention,
    visual_attention,
    visual_mask,
)
from ._method import Method, Stage

CLUSTER = 10  # recycled tokens per cluster


@called_like_ops
def sparsevlm(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    input_features: Tensor,
    input_text: Tensor,
    k: Budget,
    *,
    count: int | None = None,
    input_mask: Tensor | None = None,
    key_indices: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    recycle_ratio: float | None = 0.3,
    rank_scale: float | None = None,
    rank_bias: float = 0.0,
    scale: float | None = None,
    layout: str = "bhld",
    backend: str | None = None,
) -> Selection:
    """SparseVLM (arXiv 2410.04417), one of its stages inside the language model.

    1. Raters: m_t = mean over the visual tokens of softmax_t <h_v, h_t>, of the input embeddings, without a scale; the
       text tokens t with m_t above the mean of m.
    2. s_j = mean over raters and heads of the attention to visual token j. The n largest stay as they are.
    3. Recycling: of the D = V - n others, the r = floor(0.3 D) + 1 with the largest s; c = floor(r / 10) + 1 of these
       are centres (`density_peaks` of their hidden states, with c neighbours), the others join the centre that is
       nearest in Euclidean distance, and the mean of each cluster goes on. K = n + c.

    query [B, Hq, T, D] are the text rows behind the image, key [B, Hkv, N, D] all keys of the attention in the layer
    before, key_indices [B, V] the columns of the visual tokens among them (-1: padding; default: every key is visual),
    features [B, V, C] their hidden states. input_features [B, U, C] is what went into the first layer at all visual
    tokens of the prompt (input_mask [B, U]: which are real), input_text [B, T, C] at the rows of query; so the raters
    are the same at every stage. query_mask [B, T] marks real rows, key_mask [B, N] real keys. `count` is V of every
    sample, the width by default: n, r and c are host integers that follow from it and K, so that samples of other sizes
    belong in calls of their own, as the integration makes them; one that is shorter keeps at most its own tokens.

    rank_scale, with recycle_ratio=None only: the first version's budget, of at most k tokens. The raters' attention is
    a matrix of T' rows and V columns; min(floor(rank_scale * rank + rank_bias), V - 1) tokens stay, and all when its
    rank is V. The number stays on the device (`counts`); on a GPU, PyTorch's singular values wait for the host. The
    integration, whose sequences have lengths that the host knows, does not take it.

    Where it comes from. Raters, scores, recycling and its constants are the authors' code's, version 1; version 2 does
    not recycle: recycle_ratio=None. The rank rule is second hand. There, the budgets are tables: after layers 2, 6 and
    15 of LLaVA-1.5-7B, which is in front of 3, 7 and 16 here, n = 300, 200 and 110 of 576 tokens, with c = 9, 4 and 3,
    so K = 309, 204 and 113. As there, the integration numbers positions anew at each stage. Ours: c counts in K, n is
    the largest with n + c <= K and at least half of it; a recycled row stands at the place of its centre (there, behind
    all that are kept, by falling score); the mean is exact (there, 1e-6 is added to the count); equal densities put the
    lower index first (there, noise decides, so that runs differ); a sample none of whose rows is above the mean is
    rated by all of them (there, NaN).

    details: attention [B, V]; raters [B, T]; centres [B, c + 1], -1 after the last.

    >>> import torch
    >>> from tokenprune_kernels.methods import sparsevlm
    >>> key = torch.tensor([4.0, 0.0, 3.0, 1.0, 1.5, 0.5]).view(1, 1, 6, 1)
    >>> visual, text = torch.tensor([[[4.0], [0.0], [3.0], [6.0], [8.0], [0.0]]]), torch.tensor([[[1.0], [-1.0]]])
    >>> kept = sparsevlm(torch.ones(1, 1, 2, 1), key, visual, visual, text, 3, causal=False)
    >>> kept.indices, kept.details["raters"]  # tokens 3 and 4 are recycled
    (tensor([[0, 2, 3]]), tensor([[ True, False]]))
    >>> kept.merged.flatten(), kept.sizes
    (tensor([4., 3., 7.]), tensor([[1., 1., 2.]]))
    """
    k = check_count("sparsevlm", k)
    query, key = heads_first("sparsevlm", layout, query=query, key=key)
    if recycle_ratio is not None:
        check_ratio("sparsevlm", "recycle_ratio", recycle_ratio)
        if rank_scale is not None:
            raise ValueError(
                "sparsevlm: rank_scale must come with recycle_ratio=None, because the host has to know how many rows "
                f"are recycled, got {recycle_ratio}"
            )
    valid = visual_mask(key_indices, key_mask, backend)
    raters = _raters(input_features, input_text, input_mask, query_mask, backend)
    seen: dict[str, Any] = {
        "key_indices": key_indices, "key_mask": key_mask, "query_positions": query_positions, "scale": scale,
        "causal": causal, "backend": backend,
    }  # fmt: skip
    attention = visual_attention(query, key, lse, query_mask=raters, query_reduction="mean", **seen)
    batch, tokens = attention.shape
    check_visual("sparsevlm", "features", features, batch, tokens)
    details = {"attention": attention, "raters": raters}

    if recycle_ratio is None:
        budgets = None
        if rank_scale is not None:
            rows = row_attention(query, key, lse, **seen)
            budgets = _rank_budgets(rows, raters, valid, rank_scale, rank_bias)
        indices, counts = select_topk(attention, k, mask=valid, budgets=budgets, backend=backend)
        return Selection(indices, counts, details)

    own, recycled, clusters = _shares(k, tokens if count is None else count, recycle_ratio)
    best, _ = select_topk(attention, own, mask=valid, backend=backend)
    dropped = ~indices_to_mask(best, tokens)
    others, _ = select_topk(attention, recycled, mask=dropped if valid is None else dropped & valid, backend=backend)
    (states,) = gather_compact([features], others, dims=[1], backend=backend)
    peaks, _, _, _ = density_peaks(states, clusters, neighbors=max(clusters, 1), mask=others >= 0, backend=backend)
    # A column without a centre more: a list of one would be a graph of its own under torch.compile.
    (centres,) = gather_compact([others + 1], pad(peaks, (0, 1), value=-1), dims=[1], backend=backend)  # -1 gathers 0
    centres = centres - 1
    among = indices_to_mask(others, tokens)
    rows, sizes, assignment = merge_tokens(features, centres, mask=among, metric="euclidean", backend=backend)
    stays = indices_to_mask(torch.cat([best, centres], 1), tokens)
    indices, counts = mask_to_indices(stays, k, backend=backend)
    details["centres"] = centres
    return Selection(
        indices, counts, details, **merge_into(features, indices, centres, rows, sizes, assignment, backend)
    )


def _raters(
    input_features: Tensor, input_text: Tensor, input_mask: Tensor | None, text_mask: Tensor | None, backend: str | None
) -> Tensor:
    """[B, T] bool: the text tokens that the visual ones are nearest to, above their mean; all text if there is none."""
    mass, _, _ = cross_attention_scores(
        input_features.unsqueeze(1), input_text.unsqueeze(1), query_mask=input_mask, key_mask=text_mask, scale=1.0,
        backend=backend,
    )  # fmt: skip
    real = torch.ones_like(mass, dtype=torch.bool) if text_mask is None else text_mask
    above = (mass > mass.sum(1, keepdim=True) / real.sum(1, keepdim=True)) & real  # the mass of padding is 0
    return torch.where(above.any(1, keepdim=True), above, real)


def _shares(k: int, tokens: int, ratio: float) -> tuple[int, int, int]:
    """How many of `tokens` stay as they are, are recycled, and become of these: (n, r, c) with n + c = min(k, tokens).

    c(D) = floor((floor(ratio D) + 1) / 10) + 1 = floor((ratio D + 1) / 10) + 1, and D - c(D) = V - K gives D: the
    smallest with D - (ratio D + 1) / 10 > V - K. Millionths make these quotients of integers.
    """
    parts, whole = round(ratio * 1_000_000), 1_000_000
    k = min(k, tokens)
    dropped = ((tokens - k) * CLUSTER * whole + whole) // (CLUSTER * whole - parts) + 1
    own = max(tokens - dropped, k - k // 2)
    return own, parts * (tokens - own) // whole + 1, k - own


def _rank_budgets(rows: Tensor, raters: Tensor, valid: Tensor | None, scale: float, bias: float) -> Tensor:
    """[B] int64: how many tokens the rank of the raters' rows allows; of a sample with that rank, all."""
    # Rows and columns of zeros change no singular value; of what is not finite there are none, which is an error.
    matrix = torch.where(raters.unsqueeze(-1) & rows.isfinite(), rows, 0)
    tokens = torch.full_like(raters[:, 0], rows.shape[2], dtype=torch.int64) if valid is None else valid.sum(1)
    if valid is not None:
        matrix = matrix * valid.unsqueeze(1)
    rtol = torch.maximum(raters.sum(1), tokens) * torch.finfo(rows.dtype).eps
    rank = torch.linalg.matrix_rank(matrix, rtol=rtol)
    due = torch.minimum((rank * scale + bias).floor().long(), tokens - 1)
    return torch.where(rank == tokens, tokens, due)


SPARSEVLM = Method(
    "sparsevlm",
    (Stage(sparsevlm, "layer", needs={"rank_scale": None, "rank_bias": None}),),
    title="SparseVLM",
    summary="attention of the telling question tokens, thrice; merges some",
    paper="2410.04417",
    source="the authors' code, version 1; recycled rows stand at the places of their centres",
    positions="renumber",  # version 1 takes the first position ids for what is left
    # Of 576 tokens 309, 204 and 113: the authors' 300, 200 and 110, and the rows that are recycled.
    schedule={3: 0.5365, 7: 0.3542, 16: 0.1962},
)
