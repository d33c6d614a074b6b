"""ZSPAPrune (arXiv 2510.17197): a core that the prompt asks for, then the tokens most unlike what is kept."""

import math

import torch
from torch import Tensor

from .._op import Budget
from ..ops import cosine_scores, repulsion_sample, select_topk
from ._calls import called_like_ops
from ._common import Selection, ascending, check_count, check_ratio
from ._method import Method, Stage


@called_like_ops
def zspaprune(
    text_embeddings: Tensor,
    visual_embeddings: Tensor,
    k: Budget,
    *,
    text_mask: Tensor | None = None,
    mask: Tensor | None = None,
    core_ratio: float = 0.6,
    backend: str | None = None,
) -> Selection:
    """ZSPAPrune (arXiv 2510.17197), re-implemented from public descriptions; before the language model.

    1. Prompt simplification: t = mean of the prompt's embeddings.
    2. Prompt-aware selection: rel(j) = cos(t, v_j); the core is the K_c = max(1, floor(core_ratio * K)) best.
    3. Diversity balance: K - K_c times, add the token most unlike everything kept so far: the smallest
       max over the kept s of cos(v_i, v_s).

    text_embeddings [B, T, C] are rows of the language model's embedding table, visual_embeddings [B, V, C] the
    projector's outputs. text_mask [B, T] and mask [B, V] mark what is not padding; text_mask also says which tokens
    count as the prompt. The returned indices are positions among the V visual tokens.

    Where it comes from. The three steps are the paper's. Its ratio is set by hand for each data set and no value could
    be read: 0.6 is that of third-party baselines. The max-min aggregate is our reading ("most unlike *everything*
    kept"); those baselines keep the minimum similarity instead, against their own description. The mean is
    taken in float32 and rounded to the input's dtype. Ties go to the lower index.

    details: relevance [B, V], core [B, K_c] ascending, diverse [B, K - K_c] in order of selection.

    >>> import torch
    >>> from tokenprune_kernels.methods import zspaprune
    >>> angle = torch.tensor([0.1, 0.2, 1.0, 2.0, 3.0])
    >>> visual = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0)
    >>> kept = zspaprune(torch.tensor([[[1.0, 0.0]]]), visual, 3)
    >>> kept.indices, kept.details["core"], kept.details["diverse"]  # floor(0.6 * 3) = 1 from the prompt
    (tensor([[0, 3, 4]]), tensor([[0]]), tensor([[4, 3]]))
    """
    k = check_count("zspaprune", k)
    check_ratio("zspaprune", "core_ratio", core_ratio)
    prompt = _mean(text_embeddings, text_mask).to(visual_embeddings.dtype)

    num_core = min(k, max(1, math.floor(core_ratio * k)))
    relevance = cosine_scores(visual_embeddings, prompt, backend=backend)
    core, _ = select_topk(relevance, num_core, mask=mask, backend=backend)

    diverse, _ = repulsion_sample(visual_embeddings, k - num_core, seed_indices=core, mask=mask, backend=backend)
    indices, counts = ascending(torch.cat([core, diverse], 1), visual_embeddings.shape[1], k, backend)
    return Selection(indices, counts, {"relevance": relevance, "core": core, "diverse": diverse})


def _mean(embeddings: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, C] -> [B, 1, C] over the valid rows; 0 without any, whatever the padding holds."""
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    if mask is None:
        return wide.sum(1, keepdim=True) / max(embeddings.shape[1], 1)
    valid = mask.unsqueeze(-1)
    return torch.where(valid, wide, 0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)


ZSPAPRUNE = Method(
    "zspaprune",
    (Stage(zspaprune, "model"),),
    title="ZSPAPrune",
    summary="a core like the question, then what is least like the rest",
    paper="2510.17197",
    source="public descriptions; ratio and aggregate are our reading",
)
