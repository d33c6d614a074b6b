"""COAST (arXiv 2605.09429): anchors, their aligned evidence, and complementary context, balanced by an entropy."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._op import Budget
from ..ops import contrastive_scores, score_entropy, select_topk, select_two_tailed
from ..ops._attention import heads_first
from ._calls import called_like_ops
from ._common import (
    Selection,
    check_count,
    check_ratio,
    check_visual,
    row_attention,
    visual_attention,
    visual_mask,
)
from ._method import Method, Stage


@called_like_ops
def coast(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    k: Budget,
    *,
    key_indices: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    anchor_ratio: float = 0.8,
    context_ratio: tuple[float, float] = (0.05, 0.15),
    reference_ratio: float = 0.1,
    entropy: str = "global",
    scale: float | None = None,
    layout: str = "bhld",
    backend: str | None = None,
) -> Selection:
    """COAST (arXiv 2605.09429), re-implemented from public descriptions; no code of the authors was found.

    S is the attention of a decoder layer of the language model, averaged over heads, from text row i to visual token j.

    1. S_glo(j) = max_i S(i, j)  (Eq. 3)  and  S_last(j) = S(last row, j).
    2. p = S_glo / sum S_glo,  H = -sum_j p_j log p_j / log V, in [0, 1]  (Eq. 4): low when attention is concentrated.
       entropy="rows" is the other reading: each text row S(i, :) renormalised over the visual tokens, its entropy by
       the same formula, and H the mean over the rows.
    3. K_anchor = max(1, floor(anchor_ratio * K)), the rest is K_rest = K - K_anchor.
       alpha(H) = a + (b - a) * H with (a, b) = context_ratio.
       n_low = floor(K_rest * alpha(H)), at least 1 and at most K_rest - 1 (K_rest = 1: 1; K_rest = 0: 0).
    4. Anchors A: the K_anchor best by S_last. References R: the max(1, floor(reference_ratio * V)) lowest by S_glo.
    5. Score(c) = max_{a in A} cos(f_c, f_a) - mean_{r in R} cos(f_c, f_r)  (Eq. 8 to 10).
    6. Keep A, and of the other tokens the K_rest - n_low highest and the n_low lowest by Score.

    query [B, Hq, M, D] are the text rows after the image, key [B, Hkv, N, D] all keys of the prompt, key_indices [B, V]
    the indices of the visual tokens among them (-1: padding, never selected; default: every key is visual), features
    [B, V, C] their hidden states. query_mask [B, M] and key_mask [B, N] mark what is not padding; a visual token whose
    key is masked is never selected. lse [B, Hq, M], if the attention that ran has it, saves a pass. The returned
    indices are positions among the V visual tokens.

    Where it comes from. The formulas and equation numbers, anchor_ratio, context_ratio, the tenth of the tokens as
    references and the clamps are second hand, from a third-party adaptation of the paper. Ours: heads are averaged
    before the maximum over rows; alpha is a share of K_rest; V counts the real tokens of a sample, so that padding
    changes nothing; a reference stays a candidate, with its similarity to itself inside the mean; ties go to the lower
    index. The source takes the entropy of S_glo; that of the rows is another reading of Eq. 4, and ours. The same
    source advises layer 2 for LLaVA and layer 14 for Qwen2.5-VL-7B; that this means the attention of the layer before
    it is our reading.

    details: global, last, contrast [B, V]; entropy, num_low [B]; anchors, references (both ascending, -1 padded).

    >>> import torch
    >>> from tokenprune_kernels.methods import coast
    >>> attention = torch.tensor([4.0, 0.0, 3.0, 1.0, -1.0, 2.0])  # logits of six visual tokens
    >>> key, query = attention.view(1, 1, 6, 1), torch.ones(1, 1, 1, 1)
    >>> angle = torch.tensor([0.0, 0.1, 0.2, 1.5, 3.0, 1.0])
    >>> kept = coast(query, key, torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0), 4, anchor_ratio=0.5)
    >>> kept.indices, kept.details["anchors"]  # the anchors, their neighbour 1, and the opposite token 4
    (tensor([[0, 1, 2, 4]]), tensor([[0, 2]]))
    """
    k = check_count("coast", k)
    query, key = heads_first("coast", layout, query=query, key=key)
    check_ratio("coast", "anchor_ratio", anchor_ratio)
    check_ratio("coast", "reference_ratio", reference_ratio)
    if not isinstance(context_ratio, (tuple, list)) or len(context_ratio) != 2:
        raise TypeError(f"coast: context_ratio must be two ratios, as (0.05, 0.15), got {context_ratio!r}")
    low, high = context_ratio
    check_ratio("coast", "context_ratio[0]", low)
    check_ratio("coast", "context_ratio[1]", high)
    if entropy not in ("global", "rows"):
        raise ValueError(f"coast: entropy must be global or rows, got {entropy!r}")
    valid = visual_mask(key_indices, key_mask, backend)

    seen: dict[str, Any] = {
        "key_indices": key_indices, "key_mask": key_mask, "query_positions": query_positions, "scale": scale,
        "causal": causal, "backend": backend,
    }  # fmt: skip
    both = visual_attention(query, key, lse, query_mask=query_mask, query_reduction="max+last", **seen)
    s_glo, s_last = both.unbind(1)
    batch, tokens = s_glo.shape
    check_visual("coast", "features", features, batch, tokens)

    if entropy == "global":
        dispersion = score_entropy(s_glo, mask=valid, backend=backend)
    else:
        dispersion = _mean_entropy(row_attention(query, key, lse, **seen), query_mask, valid, backend)

    num_anchors = min(k, max(1, math.floor(anchor_ratio * k)))
    rest = k - num_anchors
    share = rest * low + rest * (high - low) * dispersion  # K_rest * alpha(H), not negative: truncating is the floor
    num_low = share.long().clamp(min(1, rest), max(rest - 1, min(1, rest)))

    anchors, _ = select_topk(s_last, num_anchors, mask=valid, backend=backend)
    references = _lowest(s_glo, reference_ratio, valid, backend)
    contrast = contrastive_scores(features, anchors, references, backend=backend)

    # Anchors at +inf come before every candidate and n_low <= K_rest, so that one two-tailed selection of K tokens
    # returns the union of A and both tails, in raster order. An anchor of -1 may write to token 0: it stands for a
    # sample with fewer tokens than K_anchor, where every real token is an anchor already.
    ranked = contrast.scatter(1, anchors[:, :tokens].clamp_min(0), math.inf)
    indices, counts = select_two_tailed(ranked, num_low, k, mask=valid, backend=backend)
    details = {
        "global": s_glo,
        "last": s_last,
        "entropy": dispersion,
        "num_low": num_low,
        "anchors": anchors,
        "references": references,
        "contrast": contrast,
    }
    return Selection(indices, counts, details)


def _mean_entropy(rows: Tensor, query_mask: Tensor | None, valid: Tensor | None, backend: str | None) -> Tensor:
    """[B]: the entropy of each row of [B, M, V], as a distribution over the real tokens; its mean over real rows."""
    batch, count, _ = rows.shape
    mask = None if valid is None else valid.unsqueeze(1).expand_as(rows).flatten(0, 1)
    of_rows = score_entropy(rows.flatten(0, 1), mask=mask, backend=backend).view(batch, count)
    if query_mask is None:
        return of_rows.mean(1)
    return torch.where(query_mask, of_rows, 0).sum(1) / query_mask.sum(1).clamp_min(1)


def _lowest(scores: Tensor, ratio: float, valid: Tensor | None, backend: str | None) -> Tensor:
    """The max(1, floor(ratio * V)) tokens with the lowest scores, V counted per sample without leaving the device."""
    tokens = scores.shape[1]
    most = max(1, math.floor(ratio * tokens))
    if valid is None or most == 1:
        return select_topk(scores, most, mask=valid, largest=False, backend=backend)[0]
    # The n-th reference is due when n <= ratio * V; the first always is. A sample with fewer real tokens has room for
    # more: fillers at -inf, lower than every attention score, take the slots that are not due, and leave as -1.
    real = valid.sum(-1, keepdim=True, dtype=torch.float64)
    fillers = torch.arange(2, most + 1, device=scores.device) > ratio * real
    scores, valid = pad(scores, (0, most - 1), value=-math.inf), torch.cat([valid, fillers], 1)
    lowest, _ = select_topk(scores, most, mask=valid, largest=False, backend=backend)
    return torch.where(lowest < tokens, lowest, -1)


COAST = Method(
    "coast",
    (Stage(coast, "layer"),),
    title="COAST",
    summary="what the question attends to, and both ends of the contrast",
    paper="2605.09429",
    source="public descriptions; no code of the authors was found",
    # For the 28 layers of the 7B model.
    layers={"Qwen2-VL": 14, "Qwen2.5-VL": 14, "Qwen3-VL": 14},
)
