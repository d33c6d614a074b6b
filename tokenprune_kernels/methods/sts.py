"""STS-style selection (after arXiv 2606.03569): structure before the language model, semantics inside it."""

import torch
from torch import Tensor

from .._op import Budget
from ..ops import repulsion_sample, select_topk
from ..ops._attention import heads_first
from ._calls import called_like_ops
from ._common import Selection, ascending, check_count, coordinates_of, visual_attention, visual_mask
from ._method import Method, Stage


@called_like_ops
def sts_structure(
    features: Tensor,
    k: Budget,
    *,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    exponent: float = 1.0,
    energy: Tensor | None = None,
    feature_weight: float = 1.0,
    position_weight: float = 1.0,
    epsilon: float = 1e-6,
    first: str = "outlier",
    backend: str | None = None,
) -> Selection:
    """STS-style stage 1, before the language model: sample by repulsion, without the prompt.

    The paper ("Structure-to-Semantics", arXiv 2606.03569) says that stage 1 covers space and structure by repulsive
    sampling, one digest of it "by potential-energy minimisation". No formula could be read; all of these are ours:

        r_ij^2   = feature_weight * 2 (1 - cos(f_i, f_j)) + position_weight * ||p_i - p_j||^2 / D^2
        phi(i,j) = 1 / (r_ij^exponent + epsilon)
        U(i)     = sum of phi(i, j) over the selected j  (+ energy_i)

    and greedily the token with the smallest U is taken, K times. exponent = 1 is the Coulomb potential; a large one
    tends to farthest-point sampling. The start is `first`: the token least similar to the mean direction (`outlier`),
    the one farthest from its nearest neighbour (`isolated`), or the lowest index (`index`). A saliency q enters as
    energy = -lambda * q [B, V], by default not at all. How K splits between the stages is open too; 2 K tokens out of
    stage 1 for K at the end is a choice of ours.

    features [B, V, C]; positions [B, V, P] in grid units, any number type: D is the diagonal of their bounding box over
    the valid tokens of the sample. mask [B, V]: True for real tokens. The returned indices are positions among the V
    visual tokens. details: order [B, K], the tokens in order of selection.

    >>> import torch
    >>> from tokenprune_kernels.methods import sts_structure
    >>> angle = torch.tensor([0.0, 0.1, 0.2, 2.0, 2.1])  # two clusters of directions
    >>> kept = sts_structure(torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0), 2)
    >>> kept.indices, kept.details["order"]
    (tensor([[0, 4]]), tensor([[4, 0]]))
    """
    k = check_count("sts_structure", k)
    if positions is not None:
        wide = torch.promote_types(features.dtype, torch.float32)
        positions = _by_diagonal(coordinates_of("sts_structure", positions, features.shape, wide), mask)
    order, _ = repulsion_sample(
        features, k, positions=positions, energy=energy, mask=mask, potential="riesz", aggregate="sum",
        feature_weight=feature_weight, position_weight=position_weight, exponent=exponent, epsilon=epsilon,
        first=first, backend=backend,
    )  # fmt: skip
    indices, counts = ascending(order, features.shape[1], k, backend)
    return Selection(indices, counts, {"order": order})


def _by_diagonal(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Positions divided by the diagonal of the bounding box of the valid ones; a single point keeps its coordinates."""
    if positions.shape[1] == 0:
        return positions
    least, most = positions, positions
    if mask is not None:
        least = positions.masked_fill(~mask.unsqueeze(-1), torch.inf)
        most = positions.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    extent = (most.amax(1, keepdim=True) - least.amin(1, keepdim=True)).clamp_min(0)
    diagonal = torch.linalg.vector_norm(extent, dim=-1, keepdim=True)
    return positions / torch.where(diagonal > 0, diagonal, 1)


@called_like_ops
def sts_semantics(
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
    """STS-style stage 2, inside the language model: keep what the instruction attends to.

    The paper (arXiv 2606.03569) removes the tokens that its instruction-aware cross-attention finds irrelevant. Ours,
    as no formula could be read:

        a(j) = mean over heads, then over the instruction rows, of softmax(q k^T * scale)(row, j);  keep the K best.

    query [B, Hq, M, D] are the instruction rows, key [B, Hkv, N, D] all keys of the prompt, key_indices [B, V] the
    indices of the visual tokens that stage 1 kept (-1: padding, never selected; default: every key is visual).
    query_mask [B, M] and key_mask [B, N] mark what is not padding. The layer is open as well; layer 2 is a choice of
    ours. The returned indices are positions among the V visual tokens. details: attention [B, V].

    >>> import torch
    >>> from tokenprune_kernels.methods import sts_semantics
    >>> key = torch.tensor([4.0, 0.0, 3.0, 1.0]).view(1, 1, 4, 1)
    >>> sts_semantics(torch.ones(1, 1, 2, 1), key, 2, causal=False).indices
    tensor([[0, 2]])
    """
    k = check_count("sts_semantics", k)
    query, key = heads_first("sts_semantics", layout, query=query, key=key)
    attention = visual_attention(
        query, key, lse, key_indices=key_indices, query_mask=query_mask, key_mask=key_mask,
        query_positions=query_positions, scale=scale, causal=causal, query_reduction="mean", backend=backend,
    )  # fmt: skip
    indices, counts = select_topk(attention, k, mask=visual_mask(key_indices, key_mask, backend), backend=backend)
    return Selection(indices, counts, {"attention": attention})


STS = Method(
    "sts",
    # Twice the final number out of stage 1 is our choice: the paper's split is not known.
    (
        Stage(sts_structure, "model", needs={"positions": "stacked_positions", "energy": None}, share=2),
        Stage(sts_semantics, "layer"),
    ),
    title="STS-style",
    summary="spread over the image, then by attention",
    paper="2606.03569",
    authors="Wang, Jiahui and Zhang, Kai and Han, Mai and Zhang, Huanghe",
    source="the idea only: the potential, the split and the layers are ours",
)
