"""DART (arXiv 2502.11494): keep a few pivots and the tokens that duplicate them least."""

import torch
from torch import Tensor

from .._masks import indices_to_mask
from .._op import Budget
from ..ops import cosine_scores, gather_compact, mask_to_indices, select_topk
from ..ops._attention import heads_first
from ._calls import called_like_ops
from ._common import Selection, check_count, check_visual, visual_mask
from ._method import Method, Stage


@called_like_ops
def dart(
    key: Tensor,
    features: Tensor,
    text_embeddings: Tensor,
    k: Budget,
    *,
    key_indices: Tensor,
    query_positions: Tensor,
    text_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    image_pivots: int = 4,
    text_pivots: int = 4,
    layout: str = "bhld",
    backend: str | None = None,
) -> Selection:
    """DART (arXiv 2502.11494), duplication-aware reduction of tokens; inside the language model.

    1. Pivots: the P_i visual tokens and the P_t text tokens with the largest L1 norm of their key, all heads together.
       The visual ones are kept.
    2. Pivot by pivot, visual ones first and each kind by falling norm: of the tokens not kept yet, keep the
       k' = ceil((K - P_i) / (P_i + P_t)) least similar to the pivot by the cosine of hidden states, until K are kept.

    key [B, Hkv, N, D] are all keys of the prompt, with RoPE, of the attention before; features [B, V, C] and
    text_embeddings [B, T, C] are hidden states of the visual and of the text tokens; key_indices [B, V] and
    query_positions [B, T] are their positions in the prompt (-1 in key_indices: padding, never selected). text_mask
    [B, T] says which text tokens are real, key_mask [B, N] which keys. The returned indices are positions among the V
    visual tokens.

    Where it comes from. The public implementations of others differ from each other, and the authors' repository was
    not available: exactly K kept tokens and pivots by falling norm are AngelSlim's, text pivots only from the text
    behind the images is LightCompress's. Ours: with fewer than P_t text tokens the others share the budget; the norms
    are float32; ties go to the lower index, and NaN comes last. The L1 norm of a rotated key depends on its position:
    in a padded batch, position ids have to count the real tokens, as `generate` makes them. A budget below P_i keeps
    the first K pivots.

    details: pivots [B, P_i + P_t], the index of each pivot among the visual or the text tokens, -1 where there is none.

    >>> import torch
    >>> from tokenprune_kernels.methods import dart
    >>> key = torch.tensor([9.0, 1.0, 1.0, 1.0, 2.0]).view(1, 1, 5, 1)  # four visual tokens and one of text
    >>> hidden = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]]])
    >>> visual, text = torch.arange(4)[None], torch.tensor([[4]])
    >>> kept = dart(key, hidden, hidden[:, :1], 2, key_indices=visual, query_positions=text, image_pivots=1)
    >>> kept.indices, kept.details["pivots"]
    (tensor([[0, 2]]), tensor([[ 0,  0, -1, -1, -1]]))
    """
    k = check_count("dart", k)
    (key,) = heads_first("dart", layout, key=key)
    batch, tokens, _ = features.shape
    check_visual("dart", "key_indices", key_indices, batch, tokens)
    norms = key.abs().sum(dim=(1, 3), dtype=torch.float64 if key.dtype == torch.float64 else torch.float32)
    free = visual_mask(key_indices, key_mask, backend)
    assert free is not None
    real = torch.ones_like(query_positions, dtype=torch.bool) if text_mask is None else text_mask
    of_image, is_image = _largest(norms, key_indices, free, image_pivots)
    is_image = is_image & (torch.arange(image_pivots, device=key.device) < k)
    of_text, is_text = _largest(norms, query_positions, real, text_pivots)
    pivots = torch.cat([of_image.where(is_image, -1), of_text.where(is_text, -1)], 1)

    taken = indices_to_mask(pivots[:, :image_pivots], tokens)
    # How many are still to be kept, and how many of them each pivot keeps: on the device, without a wait.
    left = k - is_image.sum(1)
    exists = torch.cat([is_image, is_text], 1)
    each = (left + exists.sum(1) - 1).div(exists.sum(1).clamp_min(1), rounding_mode="floor")
    (of_features,) = gather_compact([features], pivots[:, :image_pivots], dims=[1], backend=backend)
    (of_embeddings,) = gather_compact([text_embeddings], pivots[:, image_pivots:], dims=[1], backend=backend)
    vectors = torch.cat([of_features, of_embeddings], 1)
    for p in range(pivots.shape[1]):
        budgets = torch.where(exists[:, p], torch.minimum(each, left), 0)
        similarity = cosine_scores(features, vectors[:, p : p + 1], backend=backend)
        chosen, counts = select_topk(similarity, k, mask=free & ~taken, largest=False, budgets=budgets, backend=backend)
        taken = taken | indices_to_mask(chosen, tokens)
        left = left - counts
    indices, counts = mask_to_indices(taken, k, backend=backend)
    return Selection(indices, counts, {"pivots": pivots})


def _largest(norms: Tensor, positions: Tensor, real: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` real ones of the listed positions with the largest norm, by falling norm, and how many there are.

    As (indices [B, count] into the list, True [B, count] where there is one).
    """
    listed = norms.gather(1, positions.clamp_min(0).long()) if norms.shape[1] else norms.new_zeros(positions.shape)
    # A stable sort keeps the lower index first; no norm is negative, and one that is no number comes behind them.
    listed = torch.where(listed.isnan(), -0.5, listed)
    padded = torch.nn.functional.pad(torch.where(real, listed, -1.0), (0, count), value=-1.0)
    order = padded.sort(dim=1, descending=True, stable=True).indices[:, :count]
    exists = torch.nn.functional.pad(real, (0, count)).gather(1, order)
    return torch.where(exists, order, 0), exists


DART = Method(
    "dart",
    (Stage(dart, "layer"),),
    title="DART",
    summary="pivots and what is least like them",
    paper="2502.11494",
    source="public implementations, which differ; see its page of help",
)
