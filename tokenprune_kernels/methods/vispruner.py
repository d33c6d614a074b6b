"""VisPruner (arXiv 2412.01818): the most salient tokens, and of the others those that are least alike."""

import math

import torch
from torch import Tensor

from .._masks import indices_to_mask
from .._op import Budget
from ..ops import mask_to_indices, select_topk
from ._calls import called_like_ops
from ._common import Selection, check_count, check_ratio, check_visual
from ._method import Method, Stage

AT_ONCE = 8  # tokens that a round removes at most


@called_like_ops
def vispruner(
    features: Tensor,
    saliency: Tensor,
    k: Budget,
    *,
    mask: Tensor | None = None,
    important_ratio: float = 0.5,
    backend: str | None = None,
) -> Selection:
    """VisPruner (arXiv 2412.01818), important and diverse tokens, before the language model.

    1. Important: the floor(important_ratio * K) tokens with the largest saliency.
    2. Diverse: the list of all others by falling saliency. While it is longer than what is left of K, its entries at
       even places are compared with those at odd places: of the former, those with the largest cosines to any of the
       latter are removed, at most 8 and no more than are too many. The list goes on with the rest of them, by falling
       cosine, and then the latter.

    features [B, V, C] are what is compared, saliency [B, V] is what the CLS token attends to, mask [B, V] marks real
    tokens. The returned indices are positions among the V visual tokens.

    Where it comes from. The steps and the constants 0.5 and 8 are the authors' code's, also that each round puts the
    list in another order. There, features are the vision tower's states before the projector, compared in the model's
    dtype; the integration has the projector's outputs, and cosines are float32 here. Ours: a list of odd length has one
    more entry at an even place (there, an error); equal saliencies and equal cosines keep their order (there, any); a
    zero vector is like nothing.

    There are about (V - K) / 8 rounds, one after the other, in plain PyTorch: no op of ours expresses them, and under
    torch.compile each number of rounds is a graph.

    details: important [B, floor(important_ratio * K)] and diverse [B, the rest of K], ascending, -1 after the last.

    >>> import torch
    >>> from tokenprune_kernels.methods import vispruner
    >>> visual = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]]])
    >>> kept = vispruner(visual, torch.tensor([[9.0, 3.0, 2.0, 1.0]]), 3, important_ratio=0.4)
    >>> kept.indices, kept.details["important"]  # of 1, 2 and 3 the first is like the second
    (tensor([[0, 2, 3]]), tensor([[0]]))
    """
    k = check_count("vispruner", k)
    check_ratio("vispruner", "important_ratio", important_ratio)
    batch, tokens = features.shape[:2]
    check_visual("vispruner", "saliency", saliency, batch, tokens)
    num_important = math.floor(important_ratio * k)
    target = k - num_important

    important, _ = select_topk(saliency, num_important, mask=mask, backend=backend)
    rest = ~indices_to_mask(important, tokens)
    if mask is not None:
        rest = rest & mask
    order = torch.where(rest, saliency, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    length = rest.sum(1, keepdim=True)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    unit = torch.nn.functional.normalize(wide, dim=-1)
    likeness = unit @ unit.mT
    listed = order[:, : max(tokens - num_important, 0)]
    for _ in range(_rounds(listed.shape[1], target)):
        listed, length = _thinned(listed, length, target, likeness)
    there = torch.arange(listed.shape[1], device=length.device) < length
    stays = indices_to_mask(torch.where(there, listed, -1), tokens)
    diverse, _ = mask_to_indices(stays, target, backend=backend)
    indices, counts = mask_to_indices(stays | indices_to_mask(important, tokens), k, backend=backend)
    return Selection(indices, counts, {"important": important, "diverse": diverse})


def _rounds(length: int, target: int) -> int:
    """Until a list of this length is short enough; a shorter one is no later."""
    rounds = 0
    while length > target:
        length = max(length - AT_ONCE, target, length // 2)
        rounds += 1
    return rounds


def _thinned(listed: Tensor, length: Tensor, target: int, likeness: Tensor) -> tuple[Tensor, Tensor]:
    """One round on lists [B, R], of which the first `length` [B, 1] entries are there; short enough: as they were.

    likeness [B, V, V]: of the tokens that the entries name.
    """
    even, odd = listed[:, ::2], listed[:, 1::2]
    num_even, num_odd = (length + 1) // 2, length // 2
    of_even = likeness.gather(1, even.unsqueeze(2).expand(-1, -1, likeness.shape[2]))
    alike = of_even.gather(2, odd.unsqueeze(1).expand(-1, even.shape[1], -1))
    slot = torch.arange(listed.shape[1], device=listed.device)
    alike = alike.masked_fill((slot[: odd.shape[1]] >= num_odd).unsqueeze(1), -torch.inf)
    alike = torch.nn.functional.pad(alike, (0, 1), value=-torch.inf)  # because there is no maximum of nothing
    best = alike.amax(2).masked_fill(slot[: even.shape[1]] >= num_even, -torch.inf)  # what is not there comes last
    even = even.gather(1, best.sort(dim=1, descending=True, stable=True).indices)
    removed = (length - target).clamp_max(AT_ONCE).minimum(num_even).clamp_min(0)
    stay = num_even - removed
    # Behind the evens that stay come the odds, whatever their width.
    at = torch.where(slot < stay, slot + removed, even.shape[1] + slot - stay)
    thinned = torch.cat([even, odd], 1).gather(1, at.clamp(0, listed.shape[1] - 1))
    return torch.where(removed > 0, thinned, listed), length - removed


VISPRUNER = Method(
    "vispruner",
    (Stage(vispruner, "model"),),
    title="VisPruner",
    summary="the vision tower's saliency; of the rest, the least alike",
    paper="2412.01818",
    source="the authors' code; compares what the projector made",
    positions="renumber",  # the embeddings alone are shortened
)
