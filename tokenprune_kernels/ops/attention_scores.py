"""torch.ops.tokenprune.attention_scores: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, along, floats, op, scores
from ._attention import ATTENTION, BY_HEADS, BY_ROWS, HEADS, REDUCED, heads_first, reduced_shape


@op(
    **ATTENTION,
    **REDUCED,
    lse=floats("B Hq M"),
    returns=scores(reduced_shape),
    work=("key", "B * Hq * M * max(N, V) * D"),
    rule=HEADS,
    # With the lse known, each key has its score by itself; a causal row ends at a key that others may have.
    shardings=(*BY_HEADS, BY_ROWS, along("N", causal=(False,), key_indices=(None,))),
    backends=KERNELS,
)
def attention_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    key_indices: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    head_reduction: str = "mean",
    query_reduction: str = "mean",
    layout: str = "bhld",
    backend: str | None = None,
) -> Tensor:
    """Scores from a log-sum-exp that is already known, for instance from the FlashAttention call that ran.

    P = exp(s - lse) on visible keys, then reduced like `cross_attention_scores`, whose arguments these are. `lse` may
    cover keys that are not in `key`: to score the image of a longer prompt, pass the image keys alone.

    Args:
        query: [B, Hq, M, D] float16, bfloat16, float32 or float64.
        key: [B, Hkv, N, D], the dtype of `query`.
        lse: [B, Hq, M] of any floating dtype, natural logarithm. A row with lse = -inf has P = 0.
        key_indices, query_mask, key_mask, query_positions, scale, causal, cosine, head_reduction, query_reduction,
            layout, backend: as in `cross_attention_scores`.

    Returns:
        The scores alone, shaped as those of `cross_attention_scores`.

    Raises:
        TypeError, ValueError, IndexError: as in `cross_attention_scores`.

    Used where a method prunes inside the language model (COAST, STS stage 2, FastV, AdaptPrune): the attention of that
    layer has run already and most attention kernels return their log-sum-exp.

    Example:
        >>> import math, torch, tokenprune_kernels as tp
        >>> query, image = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 2, 4)
        >>> lse = torch.full((1, 1, 1), 2 + math.log(4))  # two more keys of the same logit 2 lie outside the image
        >>> tp.attention_scores(query, image, lse)
        tensor([[0.2500, 0.2500]])
    """
    if layout != "bhld":
        query, key = heads_first("tokenprune::attention_scores", layout, query=query, key=key)
    scores: Tensor = call(
        "attention_scores",
        backend,
        query,
        key,
        lse,
        key_indices=key_indices,
        query_mask=query_mask,
        key_mask=key_mask,
        query_positions=query_positions,
        scale=scale,
        causal=causal,
        cosine=cosine,
        head_reduction=head_reduction,
        query_reduction=query_reduction,
    )
    return scores if "+" in query_reduction else scores.squeeze(1)
