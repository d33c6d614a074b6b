"""IDPruner (arXiv 2602.13315): importance and diversity, weighed by maximal marginal relevance."""

import torch
from torch import Tensor

from .._op import Budget
from ..ops import repulsion_sample
from ._calls import called_like_ops
from ._common import Selection, ascending, check_count, check_visual, number_range
from ._method import Method, Stage


@called_like_ops
def idpruner(
    features: Tensor,
    importance: Tensor,
    k: Budget,
    *,
    mask: Tensor | None = None,
    weight: float = 0.5,
    backend: str | None = None,
) -> Selection:
    """IDPruner (arXiv 2602.13315), maximal marginal relevance in front of the language model.

    1. w_i = (importance_i - min) / (max - min + 1e-6), over the finite importances of the sample; an infinite one stays
       as it is, so that it comes before or behind every finite one.
    2. First the largest w; then K - 1 times the largest weight * w_i - (1 - weight) * max over the kept j of
       cos(f_i, f_j).

    features [B, V, C] are the projector's outputs, importance [B, V] any score of theirs, mask [B, V] marks real
    tokens, weight lies between 0 and 1, where the steps are `divprune` from another start and `select_topk`. The
    returned indices are positions among the V visual tokens.

    Where it comes from. The steps, their constants and weight = 0.5 are the authors' code's. There, the importance
    comes from a scorer that was trained for it; it is the user's, and the integration has the vision tower's saliency
    instead, which is our choice. Ours: a batch has the ranges of its samples, one token is picked at a time (there, a
    parameter), cosines are exact (there, 1e-8 is added to a norm) and a NaN importance comes last.

    details: importance w [B, V], order [B, K] in order of selection.

    >>> import torch
    >>> from tokenprune_kernels.methods import idpruner
    >>> visual = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0]]])
    >>> kept = idpruner(visual, torch.tensor([[5.0, 4.0, 3.0, 0.0]]), 2)  # 1 is too like 0, 3 too unimportant
    >>> kept.indices
    tensor([[0, 2]])
    """
    k = check_count("idpruner", k)
    if not 0 < weight < 1:
        raise ValueError(f"idpruner: weight must lie between 0 and 1, got {weight}")
    batch, tokens = features.shape[:2]
    check_visual("idpruner", "importance", importance, batch, tokens)
    wide = importance.to(torch.promote_types(importance.dtype, torch.float32))
    low, high = number_range(wide, mask)
    scaled = torch.where(wide.isinf(), wide, (wide - low) / (high - low + 1e-6))
    order, _ = repulsion_sample(features, k, energy=scaled * (-weight / (1 - weight)), mask=mask, backend=backend)
    indices, counts = ascending(order, tokens, k, backend)
    return Selection(indices, counts, {"importance": scaled, "order": order})


IDPRUNER = Method(
    "idpruner",
    (Stage(idpruner, "model", needs={"importance": "saliency"}),),
    title="IDPruner",
    summary="the vision tower's saliency, less what is like the kept",
    paper="2602.13315",
    source="the authors' code; saliency stands for their trained scorer",
)
