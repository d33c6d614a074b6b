"""MMTok (arXiv 2508.18264): the tokens that together cover the question and the image."""

import torch
from torch import Tensor

from .._op import Budget
from ..ops import coverage_sample
from ._calls import called_like_ops
from ._common import Selection, ascending, check_count, check_visual
from ._method import Method, Stage


@called_like_ops
def mmtok(
    features: Tensor,
    text_embeddings: Tensor,
    k: Budget,
    *,
    image_embeddings: Tensor | None = None,
    text_mask: Tensor | None = None,
    mask: Tensor | None = None,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    visual_temperature: float = 0.2,
    backend: str | None = None,
) -> Selection:
    """MMTok (arXiv 2508.18264), coverage of both modalities, before the language model.

    1. P_ij = softmax over the visual tokens j of cos(z_i, x_j) / text_temperature, for each of T text rows;
       Q_ij = softmax over j of cos(y_i, y_j) / visual_temperature, for each of V visual tokens.
    2. C = 0; K times: keep the n with the largest sum over text rows of max(P_rn - C_r, 0) / T, plus alpha / V times
       the same sum of Q over visual rows; C_r becomes the maximum of C_r and the column of n.

    features x [B, V, C] are the projector's outputs, text_embeddings z [B, T, C] rows of the language model's embedding
    table, image_embeddings y [B, V, E] the vision tower's states before the projector, x by default. text_mask [B, T]
    and mask [B, V] mark what is not padding. The returned indices are positions among the V.

    Where it comes from. The steps and constants are the authors' code's; its text_temperature is 0.01 for Qwen2.5-VL.
    There, the text is the question without stop words and the instructions of two benchmarks, and y always the tower's.
    Ours: the integration gives all text behind the images and compares the projector's outputs; the weights 1 / T and
    alpha / V multiply sums instead of the matrix, which differs by rounding; the softmax is float32; a token with NaN
    covers nothing.

    details: order [B, K] in order of selection, gains [B, K].

    >>> import torch
    >>> from tokenprune_kernels.methods import mmtok
    >>> visual = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.1], [0.0, 0.0, 1.0]]])
    >>> mmtok(visual, torch.tensor([[[0.0, 0.0, 2.0]]]), 2).details["order"]  # the question, then the larger part
    tensor([[3, 1]])
    """
    k = check_count("mmtok", k)
    batch, tokens = features.shape[:2]
    seen = features if image_embeddings is None else image_embeddings
    check_visual("mmtok", "image_embeddings", seen, batch, tokens)
    if text_embeddings.dim() != 3 or text_embeddings.shape[::2] != (batch, features.shape[2]):
        expected = f"[B, T, C] = [{batch}, T, {features.shape[2]}]"
        raise ValueError(f"mmtok: text_embeddings must have shape {expected}, got {list(text_embeddings.shape)}")
    real = features.new_ones((batch, tokens), dtype=torch.bool) if mask is None else mask
    text_real = (
        text_embeddings.new_ones(text_embeddings.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
    )
    x, y, z = (_unit(t) for t in (features, seen, text_embeddings))
    rows = torch.cat([_shares(z @ x.mT / text_temperature, real), _shares(y @ y.mT / visual_temperature, real)], 1)
    weights = [
        factor / is_row.sum(1, keepdim=True).clamp_min(1).to(rows.dtype).expand(is_row.shape)
        for factor, is_row in ((1.0, text_real), (alpha, real))
    ]
    order, gains, _ = coverage_sample(
        rows, k, row_weights=torch.cat(weights, 1), row_mask=torch.cat([text_real, real], 1), mask=real, backend=backend
    )
    indices, counts = ascending(order, tokens, k, backend)
    return Selection(indices, counts, {"order": order, "gains": gains})


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-8)


def _shares(logits: Tensor, real: Tensor) -> Tensor:
    """The softmax over the real tokens; one whose likeness is NaN takes no part."""
    real = real.unsqueeze(1) & ~logits.isnan()
    return torch.where(real, torch.softmax(torch.where(real, logits, -torch.inf), -1), 0)


MMTOK = Method(
    "mmtok",
    (Stage(mmtok, "model"),),
    title="MMTok",
    summary="what covers the question and the image together",
    paper="2508.18264",
    source="the authors' code; all text behind the images, and the projector's outputs alone, are our choice",
    positions="renumber",  # of LLaVA; the authors keep those of mRoPE
)
