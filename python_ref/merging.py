"""Merging: every token joins the kept token that it resembles most, and each kept token becomes the mean of its own."""

import torch
from torch import Tensor

from ._common import best_candidate, entries, normalize, row_distances, widen


def _nearest(
    keys: Tensor,
    index: Tensor,
    is_target: Tensor,
    mask: Tensor | None,
    threshold: float | None,
    metric: str,
    include_targets: bool,
) -> Tensor:
    """[B, N]: the slot of the target that each token joins, or -1."""
    batch, n, _ = keys.shape
    if not n or not index.shape[1]:
        return index.new_full((batch, n), -1)
    of_targets = keys.take_along_dim(index.unsqueeze(-1), dim=1)
    if metric == "cosine":
        likeness = normalize(keys) @ normalize(of_targets).mT
    else:
        likeness = -row_distances(keys, of_targets).sqrt()
    slot = best_candidate(likeness, is_target.unsqueeze(1).expand_as(likeness))
    best = likeness.gather(2, slot.clamp_min(0))
    joins = ~best.isnan()
    if threshold is not None:
        joins &= best >= (threshold if metric == "cosine" else -threshold)
    joined = torch.where(joins, slot, -1).squeeze(-1)
    if mask is not None:
        joined = torch.where(mask, joined, -1)
    own = torch.arange(index.shape[1], device=index.device).expand_as(index)
    own = own if include_targets else torch.full_like(own, -1)
    spare = torch.where(is_target, index, n)  # absent targets write behind the last token
    return torch.nn.functional.pad(joined, (0, 1)).scatter(1, spare, own)[:, :n].contiguous()


def merge_tokens(
    values: Tensor,
    targets: Tensor,
    *,
    keys: Tensor | None = None,
    assignment: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: float | None = None,
    metric: str = "cosine",
    include_targets: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean of the tokens that join each target, the weights that it has, and who joined whom."""
    batch, n, channels = values.shape
    slots = targets.shape[1]
    of_targets = entries(targets, n)
    if assignment is None:
        compared = values if keys is None else keys
        assignment = _nearest(compared, *of_targets, mask, threshold, metric, include_targets)
    else:
        assignment = assignment.clone(memory_format=torch.contiguous_format)
    slot, joins = entries(assignment, slots)
    x = widen(values)
    weight = x.new_ones(batch, n) if weights is None else torch.where(weights > 0, widen(weights).to(x.dtype), 0)
    weight = torch.where(joins, weight, 0)
    weighted = torch.where(weight.unsqueeze(-1) > 0, weight.unsqueeze(-1) * x, 0)
    sizes, total = x.new_zeros(batch, slots), x.new_zeros(batch, slots, channels)
    for i in range(n if slots else 0):  # in the order of the tokens, without atomic additions
        sizes.scatter_add_(1, slot[:, i : i + 1], weight[:, i : i + 1])
        total.scatter_add_(1, slot[:, i : i + 1, None].expand(-1, -1, channels), weighted[:, i : i + 1])
    merged = torch.where(sizes.unsqueeze(-1) > 0, total / sizes.unsqueeze(-1), 0)
    return merged.to(values.dtype), sizes, assignment
