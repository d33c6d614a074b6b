"""VisionZip (arXiv 2412.04467): the most salient tokens, and a few that the others are merged into."""

import torch
from torch import Tensor

from .._masks import indices_to_mask
from .._op import Budget
from ..ops import gather_compact, mask_to_indices, merge_tokens, select_topk
from ._calls import called_like_ops
from ._common import Selection, check_count, check_ratio, check_visual, merge_into
from ._method import Method, Stage


@called_like_ops
def visionzip(
    features: Tensor,
    saliency: Tensor,
    k: Budget,
    *,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    contextual_ratio: float = 10 / 64,
    backend: str | None = None,
) -> Selection:
    """VisionZip (arXiv 2412.04467), dominant and contextual tokens, before the language model.

    1. Dominant: the d = K - c tokens with the largest saliency, c = round(contextual_ratio * K).
    2. Contextual: of the R others in raster order, c targets at 0, step, 2 step, ..., step = max(1, R // c).
    3. What is left joins the target t with the largest cos(key_i, key_t), ties to the first one, and what is kept at
       the place of a target is x_t + mean of the x_i that joined it.

    features x [B, V, C] are what is merged, saliency [B, V] is what the CLS token attends to, keys [B, V, E] is what is
    compared, `features` by default. mask [B, V] marks real tokens. The returned indices are positions among the V;
    `merged`, `sizes` and `assignment` of the `Selection` say what becomes of them.

    Where it comes from. The steps are the authors' code's, also that a target counts as much as the mean of all that
    joined it. There, x are the states of the vision tower's last layer but one, in front of the projector, keys the
    mean over heads of that layer's keys, and the saliency the sum over heads of its attention; a mean instead changes
    nothing. The integration has the projector's outputs, and compares those. The authors keep the CLS token and count
    it as dominant: their 54 + 10 are K = 63 here, and 108 + 20 and 162 + 30 are K = 127 and 191. Ours: the contextual
    tokens stay at the places of their targets (there, they come behind the dominant ones: `details` has both lists), a
    sample of fewer than d + c tokens keeps them all (there, an error), and a token whose cosine is NaN joins none.

    details: dominant [B, d] and contextual [B, c], ascending, -1 where there is none.

    >>> import torch
    >>> from tokenprune_kernels.methods import visionzip
    >>> visual = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
    >>> kept = visionzip(visual, torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.1, 0.0]]), 3, contextual_ratio=0.3)
    >>> kept.indices, kept.details["contextual"]
    (tensor([[0, 1, 4]]), tensor([[1]]))
    >>> kept.merged  # token 1 plus the mean of 2, 3 and 5
    tensor([[[9.0000, 9.0000],
             [2.0000, 1.6667],
             [0.0000, 2.0000]]])
    """
    k = check_count("visionzip", k)
    check_ratio("visionzip", "contextual_ratio", contextual_ratio)
    batch, tokens = features.shape[:2]
    check_visual("visionzip", "saliency", saliency, batch, tokens)
    num_contextual = int(contextual_ratio * k + 0.5)

    dominant, _ = select_topk(saliency, k - num_contextual, mask=mask, backend=backend)
    is_dominant = indices_to_mask(dominant, tokens)
    rest = ~is_dominant if mask is None else mask & ~is_dominant
    listed, left = mask_to_indices(rest, tokens, backend=backend)
    step = left.unsqueeze(1).div(max(1, num_contextual), rounding_mode="floor").clamp_min(1)
    at = torch.arange(num_contextual, device=features.device) * step
    exists = at < left.unsqueeze(1)
    (contextual,) = gather_compact([listed], torch.where(exists, at, -1), dims=[1], backend=backend)
    contextual = torch.where(exists, contextual, -1)

    mean, joined, assignment = merge_tokens(
        features, contextual, keys=keys, mask=rest, include_targets=False, backend=backend
    )
    (targets,) = gather_compact([features], contextual, dims=[1], backend=backend)
    indices, counts = mask_to_indices(is_dominant | indices_to_mask(contextual, tokens), k, backend=backend)
    merging = merge_into(features, indices, contextual, targets + mean, joined + exists, assignment, backend)
    return Selection(indices, counts, {"dominant": dominant, "contextual": contextual}, **merging)


VISIONZIP = Method(
    "visionzip",
    (Stage(visionzip, "model"),),
    title="VisionZip",
    summary="the vision tower's saliency; the others are merged into a few",
    paper="2412.04467",
    source="the authors' code; merges what the projector made, by likeness of the same",
    positions="renumber",  # only the embeddings are shortened
)
