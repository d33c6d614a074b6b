"""torch.ops.tokenprune.attention_entropy: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, along, op, scores
from ._attention import ATTENTION, HEADS, heads_first


@op(
    **ATTENTION,
    returns={"entropy": scores("B Hq M"), "lse": scores("B Hq M")},
    work=("key", "B * Hq * M * N * D"),
    rule=HEADS,
    shardings=(along("Hq Hkv"), along("M", causal=(False,))),
    backends=KERNELS,
)
def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    layout: str = "bhld",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy and log-sum-exp of every query row over its visible keys: (entropy, lse), both [B, Hq, M].

    The first half of `cross_attention_scores`, for callers that need no column scores: how concentrated each head's
    attention is (a low entropy marks heads that look at few tokens), or an lse for `attention_scores`.

    Args:
        query: [B, Hq, M, D] float16, bfloat16, float32 or float64.
        key: [B, Hkv, N, D], the dtype of `query`.
        key_mask, query_positions, scale, causal, cosine, layout, backend: as in `cross_attention_scores`.

    Returns:
        entropy (nats) and lse, float32 (float64 for float64 inputs), without gradient. A row that sees nothing has
        entropy 0 and lse -inf.

    Raises:
        TypeError: an argument has the wrong dtype or is no tensor.
        ValueError: a wrong shape or device.

    Example:
        >>> import torch, tokenprune_kernels as tp
        >>> entropy, lse = tp.attention_entropy(torch.zeros(1, 2, 1, 8), torch.ones(1, 1, 4, 8))
        >>> entropy  # uniform over four keys: log 4
        tensor([[[1.3863],
                 [1.3863]]])
    """
    if layout != "bhld":
        query, key = heads_first("tokenprune::attention_entropy", layout, query=query, key=key)
    return call(
        "attention_entropy",
        backend,
        query,
        key,
        key_mask=key_mask,
        query_positions=query_positions,
        scale=scale,
        causal=causal,
        cosine=cosine,
    )
