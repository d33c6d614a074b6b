"""VisPruner (arXiv 2412.01818): the most salient tokens, and of the others those that are least alike."""

import math

import torch
from torch import Tensor

from .._masks import indices_to_mask
from .._op import Budget
from ..ops import gather_compact, mask_to_indices, select_topk
from ._calls import called_like_ops
from ._common import Selection, check_count, check_ratio, check_visual
from ._method import Method, Stage

AT_ONCE = 8  # tokens that a round removes at most
RENUMBERED = 64  # rounds after which the products of what was removed are left behind


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
    zero vector is like nothing; a NaN saliency comes last, and a token whose features have one goes first.

    There are about (V - K) / 8 rounds, one after the other, which no op of ours expresses. All cosines are computed
    once, and a round reads those of the odd places. Under torch.compile each number of rounds is a graph.

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
    most = max(tokens - num_important, 0)
    # The list is of places in the order of saliency, and two more, so that there always is an odd one: what is behind
    # the last token names the last place, which no token has, and which is like nothing.
    width = most + 2
    ranked = torch.where(saliency.isnan(), torch.nan, -saliency).sort(dim=1, stable=True).indices  # NaN last
    at, length = mask_to_indices(rest.gather(1, ranked), width, backend=backend)
    (order,) = gather_compact([ranked + 1], at, dims=[1], backend=backend)  # -1 gathers 0
    order, length, place = order - 1, length.unsqueeze(1), torch.arange(width, device=at.device)
    listed = torch.where(place < length, place, width - 1)
    (compared,) = gather_compact([features], order, dims=[1], backend=backend)
    unit = torch.nn.functional.normalize(compared.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    # By columns: NaN is removed first; by rows, where others are compared with it, it is like nothing.
    likeness = torch.where(unit.isnan().any(-1, keepdim=True), 0, unit) @ unit.mT
    likeness[:, -1] = -torch.inf
    likeness[:, :, -1] = -torch.inf
    for done in range(_rounds(most, target)):
        if done and done % RENUMBERED == 0:  # every round reads half of the products: those of what is left alone
            for dim in (1, 2):
                (likeness,) = gather_compact([likeness], listed, dims=[dim], backend=backend)
            order = order.gather(1, listed)
            listed = torch.where(place[:width] < length, place[:width], width - 1)
        # The longest list loses AT_ONCE tokens, or is left with fewer than that.
        width = min(most, max(most - AT_ONCE * (done + 1), target, AT_ONCE - 1)) + 2
        listed, length = _thinned(listed, length, target, width, likeness, backend)
    stays = indices_to_mask(order.gather(1, listed), tokens)
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


def _thinned(
    listed: Tensor, length: Tensor, target: int, width: int, likeness: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    """One round on lists [B, R] of places, of which the first `length` [B, 1] are tokens; short enough: as they were.

    likeness [B, P, P] of all places; `width` is what the longest list needs afterwards.
    """
    even, odd = listed[:, ::2], listed[:, 1::2]
    (of_odd,) = gather_compact([likeness], odd, dims=[1], backend=backend)
    best = of_odd.amax(1).gather(1, even)
    even = even.gather(1, best.sort(dim=1, descending=True, stable=True).indices)
    num_even = (length + 1) // 2
    removed = (length - target).clamp(0, AT_ONCE).minimum(num_even)
    stay = num_even - removed
    # Behind the evens that stay come the odds, of which the last is no token.
    slot = torch.arange(width, device=listed.device)
    at = torch.where(slot < stay, slot + removed, even.shape[1] + slot - stay).clamp_max(listed.shape[1] - 1)
    thinned = torch.cat([even, odd], 1).gather(1, at)
    return torch.where(removed > 0, thinned, listed[:, :width]), length - removed


VISPRUNER = Method(
    "vispruner",
    (Stage(vispruner, "model"),),
    title="VisPruner",
    summary="the vision tower's saliency; of the rest, the least alike",
    paper="2412.01818",
    source="the authors' code; compares what the projector made",
    positions="renumber",  # the embeddings alone are shortened
)
