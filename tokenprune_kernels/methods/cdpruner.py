"""CDPruner (arXiv 2506.10967): the subset that is relevant to the question and diverse, by a determinant."""

import torch
from torch import Tensor

from .._op import Budget
from ..ops import cosine_scores, dpp_sample
from ._calls import called_like_ops
from ._common import Selection, ascending, check_count, check_visual, number_range
from ._method import Method, Stage


@called_like_ops
def cdpruner(
    features: Tensor,
    text_embeddings: Tensor,
    k: Budget,
    *,
    image_embeddings: Tensor | None = None,
    text_mask: Tensor | None = None,
    mask: Tensor | None = None,
    shared_range: bool = False,
    backend: str | None = None,
) -> Selection:
    """CDPruner (arXiv 2506.10967), conditional diversity by a determinantal point process, before the language model.

    1. Relevance: r_i = -mean over the text rows m of cos(e_i, t_m), e and t from the two towers of CLIP. The minus is
       the authors': there, patches that resemble a text are not those that it is about.
    2. Quality: q_i = (r_i - min r + 1e-6) / (max r - min r).
    3. Greedy MAP of the process with the kernel L_ij = q_i q_j cos(f_i, f_j), K steps.

    features f [B, V, C] are the projector's outputs. image_embeddings e [B, V, E] are the patches of the vision tower
    behind its final norm and its projection into CLIP's joint space, text_embeddings t [B, M, E] what the text tower
    makes of the question, one row for each of its segments. Without image_embeddings, e is f and t [B, M, C] are the
    rows of the language model's embedding table; r_i is the mean then, without the minus.
    Without any row of text, M = 0, all qualities are 1: diversity alone.
    text_mask [B, M] and mask [B, V] mark what is not padding. The returned indices are positions among the V tokens.

    Where it comes from. The steps and constants are the authors' code's. What to do without CLIP's text tower, which
    most models leave out, is our choice. In that code a batch is the crops of one or more images, each crop a sample
    that keeps K tokens, and the minimum and the maximum run over all of them: `shared_range` says so; by default they
    are those of the sample, which then does not depend on the others. Two things differ on purpose: relevances that
    are all equal give the quality 1 (there, a division by zero), and picks beyond the rank of the kernel change
    nothing (there, they divide by rounding errors, and tokens are picked twice, so that fewer than K are kept).

    Samples that keep different numbers are calls of their own, which share a range among themselves only.

    details: relevance and quality [B, V], order [B, K] in order of selection, gains [B, K].

    >>> import torch
    >>> from tokenprune_kernels.methods import cdpruner
    >>> visual = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    >>> kept = cdpruner(visual, torch.tensor([[[2.0, 1.0]]]), 2)  # the first two are alike: only one of them is kept
    >>> kept.indices, kept.details["order"]
    (tensor([[1, 2]]), tensor([[1, 2]]))
    """
    k = check_count("cdpruner", k)
    batch, tokens = features.shape[:2]
    if image_embeddings is None:
        relevance = cosine_scores(features, text_embeddings, query_mask=text_mask, reduction="mean", backend=backend)
    else:
        check_visual("cdpruner", "image_embeddings", image_embeddings, batch, tokens)
        relevance = -cosine_scores(
            image_embeddings, text_embeddings, query_mask=text_mask, reduction="mean", backend=backend
        )
    quality = _scaled(relevance, mask, shared_range)
    order, gains, _ = dpp_sample(features, k, quality=quality, mask=mask, backend=backend)
    indices, counts = ascending(order, tokens, k, backend)
    return Selection(indices, counts, {"relevance": relevance, "quality": quality, "order": order, "gains": gains})


def _scaled(relevance: Tensor, mask: Tensor | None, shared_range: bool) -> Tensor:
    """To about [0, 1] by the smallest and the largest number of the valid tokens; 1 where all are equal."""
    low, high = number_range(relevance, mask)
    if shared_range:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    return torch.where(high > low, (relevance - low + 1e-6) / (high - low), 1)


CDPRUNER = Method(
    "cdpruner",
    (Stage(cdpruner, "model", optional=("text_embeddings", "text_mask")),),
    title="CDPruner",
    summary="the largest determinant of likeness times relevance to the question",
    paper="2506.10967",
    source="the authors' code; relevance without CLIP's text tower is our choice",
    positions="renumber",  # only the embeddings are shortened
)
