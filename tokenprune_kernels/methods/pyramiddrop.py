"""PyramidDrop (arXiv 2410.17247): fewer visual tokens at each quarter of the model, by its own next projections."""

from torch import Tensor

from .._op import Budget
from ..ops import select_topk
from ..ops._attention import heads_first
from ._calls import called_like_ops
from ._common import Selection, check_count, visual_attention, visual_mask
from ._method import Method, Stage


@called_like_ops
def pyramiddrop(
    query: Tensor,
    key: Tensor,
    k: Budget,
    *,
    key_indices: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    scale: float | None = None,
    layout: str = "bhld",
    backend: str | None = None,
) -> Selection:
    """PyramidDrop (arXiv 2410.17247), one of its stages: what the last prompt token is about to attend to.

        a(j) = mean over heads of softmax(q k^T * scale)(last row, j);  keep the K best.

    query [B, Hq, M, D] and key [B, Hkv, N, D] are those that the *coming* layer's own projections make of the hidden
    states in front of it, behind its norm and with RoPE: this, the last row and the schedule are the authors' code. Of
    query only the last row that query_mask [B, M] leaves is needed; key_indices [B, V] are the columns of the visual
    tokens (-1: padding, never selected; default: every key is visual), key_mask [B, N] marks real keys. The returned
    indices are positions among the V visual tokens. details: attention [B, V].

    The schedule keeps a half, a quarter and an eighth of the image's tokens, rounded down, from layers 8, 16 and 24 of
    32 on. Ours: in a model of L layers they are floor(layer * L / 32), at least 1; probabilities are float32, where the
    authors' half precision ties; keys of grouped queries are shared, on which the authors' code fails. As there, the
    integration numbers positions anew at each stage, in the layers from there on.

    >>> import torch
    >>> from tokenprune_kernels.methods import get_method, pyramiddrop
    >>> key = torch.tensor([4.0, 0.0, 3.0, 1.0]).view(1, 1, 4, 1)
    >>> pyramiddrop(torch.ones(1, 1, 1, 1), key, 2).indices
    tensor([[0, 2]])
    >>> get_method("pyramiddrop").scheduled(28)
    {7: 0.5, 14: 0.25, 21: 0.125}
    """
    k = check_count("pyramiddrop", k)
    query, key = heads_first("pyramiddrop", layout, query=query, key=key)
    attention = visual_attention(
        query, key, lse, key_indices=key_indices, query_mask=query_mask, key_mask=key_mask,
        query_positions=query_positions, scale=scale, causal=causal, query_reduction="last", backend=backend,
    )  # fmt: skip
    indices, counts = select_topk(attention, k, mask=visual_mask(key_indices, key_mask, backend), backend=backend)
    return Selection(indices, counts, {"attention": attention})


_OWN = {"query": "next_query", "key": "next_key", "scale": "next_scale", "lse": None}

PYRAMIDDROP = Method(
    "pyramiddrop",
    (Stage(pyramiddrop, "layer", needs=_OWN),),
    title="PyramidDrop",
    summary="attention of the last question token, thrice",
    paper="2410.17247",
    source="the authors' code",
    positions="renumber",  # at every stage, in the layers from there on
    schedule={8: 0.5, 16: 0.25, 24: 0.125},
)
