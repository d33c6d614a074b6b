"""The baselines that every paper compares with: FastV, DivPrune and a random choice."""

import torch
from torch import Tensor

from .._op import Budget
from ..ops import repulsion_sample, select_topk
from ..ops._attention import heads_first
from ._calls import called_like_ops, check_argument
from ._common import Selection, ascending, check_count, visual_attention, visual_mask
from ._method import Method, Stage


@called_like_ops
def fastv(
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
    """FastV (arXiv 2403.06764): the K visual tokens that the last prompt token attends to most, mean over heads.

    The last row is what the authors' code uses (attention of layer 1, before layer 2). Arguments as in
    `adaptprune`: query needs only the last row; -1 in key_indices and keys masked by key_mask are never selected. The
    returned indices are positions among the V visual tokens. details: attention [B, V].

    >>> import torch
    >>> from tokenprune_kernels.methods import fastv
    >>> key = torch.tensor([4.0, 0.0, 3.0, 1.0]).view(1, 1, 4, 1)
    >>> fastv(torch.ones(1, 1, 1, 1), key, 2).indices
    tensor([[0, 2]])
    """
    k = check_count("fastv", k)
    query, key = heads_first("fastv", layout, query=query, key=key)
    attention = visual_attention(
        query, key, lse, key_indices=key_indices, query_mask=query_mask, key_mask=key_mask,
        query_positions=query_positions, scale=scale, causal=causal, query_reduction="last", backend=backend,
    )  # fmt: skip
    indices, counts = select_topk(attention, k, mask=visual_mask(key_indices, key_mask, backend), backend=backend)
    return Selection(indices, counts, {"attention": attention})


@called_like_ops
def divprune(
    features: Tensor, k: Budget, *, mask: Tensor | None = None, first: str = "isolated", backend: str | None = None
) -> Selection:
    """DivPrune (arXiv 2503.02175): the subset whose smallest pairwise cosine distance is largest, greedily.

    The start is the token farthest from its nearest neighbour; then K - 1 times the token with the smallest
    max over the kept s of cos(f_i, f_s). features [B, V, C] are the projector's outputs, mask [B, V] marks real tokens.
    The returned indices are positions among the V visual tokens. details: order [B, K], in order of selection.

    >>> import torch
    >>> from tokenprune_kernels.methods import divprune
    >>> angle = torch.tensor([0.0, 0.1, 0.2, 1.2, 2.0, 2.1])
    >>> kept = divprune(torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0), 3)
    >>> kept.indices, kept.details["order"]
    (tensor([[0, 3, 5]]), tensor([[3, 0, 5]]))
    """
    k = check_count("divprune", k)
    order, _ = repulsion_sample(features, k, mask=mask, first=first, backend=backend)
    indices, counts = ascending(order, features.shape[1], k, backend)
    return Selection(indices, counts, {"order": order})


@torch.no_grad()
def random(
    n: int,
    k: Budget,
    generator: torch.Generator | None = None,
    *,
    batch: int = 1,
    mask: Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Selection:
    """K of n tokens, uniformly without replacement, independently for each of `batch` samples.

    With mask [B, n], only real tokens take part, and batch and device are those of the mask. Otherwise the device is
    `device`, by default that of the generator.
    details: keys [B, n] float32; the K largest are kept.

    >>> import torch
    >>> from tokenprune_kernels.methods import random
    >>> first = random(576, 128, torch.Generator().manual_seed(0))
    >>> again = random(576, 128, torch.Generator().manual_seed(0))
    >>> first.indices.shape, bool((first.indices == again.indices).all())
    (torch.Size([1, 128]), True)
    """
    n = check_count("random", n, "n")
    if mask is not None:
        check_argument("random", "mask", mask, None)
        if mask.shape[1] != n:
            raise ValueError(f"random: mask must have shape [B, n] with n = {n}, got {list(mask.shape)}")
        batch, device = mask.shape[0], mask.device
    elif device is None and generator is not None:
        device = generator.device
    keys = torch.empty(batch, n, dtype=torch.float32, device=device).uniform_(generator=generator)
    indices, counts = select_topk(keys, k, mask=mask, backend=backend)
    return Selection(indices, counts, {"keys": keys})


FASTV = Method(
    "fastv",
    (Stage(fastv, "layer"),),
    title="FastV",
    summary="baseline: attention of the last question token",
    paper="2403.06764",
    source="the row that the authors' code reads",
    baseline=True,
)

DIVPRUNE = Method(
    "divprune",
    (Stage(divprune, "model"),),
    title="DivPrune",
    summary="baseline: diversity alone, no question",
    paper="2503.02175",
    source="its max-min objective, greedily",
    baseline=True,
)

RANDOM = Method(
    "random",
    # The mask, which is always given, says what batch and device are.
    (Stage(random, "model", needs={"mask": "present", "batch": None, "device": None}),),
    title="Random",
    summary="baseline: chance",
    baseline=True,
)
