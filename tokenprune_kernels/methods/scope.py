"""SCOPE (arXiv 2510.24214): salient tokens that together cover the image."""

import torch
from torch import Tensor

from .._op import Budget
from ..ops import coverage_sample
from ._calls import called_like_ops
from ._common import Selection, ascending, check_count, check_visual
from ._method import Method, Stage


@called_like_ops
def scope(
    features: Tensor,
    saliency: Tensor,
    k: Budget,
    *,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    backend: str | None = None,
) -> Selection:
    """SCOPE (arXiv 2510.24214), saliency times coverage, before the language model.

    1. S_rn = cos(f_r, f_n) over the visual tokens, and C_r = 0: how well row r is covered.
    2. K times: keep the token with the largest (sum over r of max(S_rn - C_r, 0)) * saliency_n^alpha; C_r becomes
       max(C_r, S_r,pick).

    features [B, V, C] are states of the vision tower before the projector, or the projector's outputs; saliency [B, V]
    is what the CLS token attends to. mask [B, V] marks real tokens. The returned indices are positions among the V.

    Where it comes from. Two public programs agree on the steps and on alpha = 1; they differ in the features, the
    tower's states or the projector's outputs (which the integration has), and in the saliency, summed or averaged over
    heads, a constant factor that changes nothing. What the authors' own code uses could not be told. The similarities
    are those of float32 (there, of the dtype of the model, in which many gains are equal), a zero vector resembles
    nothing (there, it is NaN and goes first), and a weight saliency^alpha that is negative or NaN counts as 0.

    details: order [B, K] in order of selection, gains [B, K].

    >>> import torch
    >>> from tokenprune_kernels.methods import scope
    >>> visual = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]])
    >>> kept = scope(visual, torch.tensor([[4.0, 1.0, 1.0, 2.0]]), 2)
    >>> kept.indices, kept.details["order"]
    (tensor([[0, 3]]), tensor([[0, 3]]))
    """
    k = check_count("scope", k)
    batch, tokens = features.shape[:2]
    check_visual("scope", "saliency", saliency, batch, tokens)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    unit = torch.nn.functional.normalize(wide, dim=-1)
    order, gains, _ = coverage_sample(
        unit @ unit.mT, k, quality=saliency.to(wide.dtype) ** alpha, row_mask=mask, mask=mask, backend=backend
    )
    indices, counts = ascending(order, tokens, k, backend)
    return Selection(indices, counts, {"order": order, "gains": gains})


SCOPE = Method(
    "scope",
    (Stage(scope, "model"),),
    title="SCOPE",
    summary="the vision tower's saliency times what a token covers of the image",
    paper="2510.24214",
    source="two public programs, which agree on the selection",
)
