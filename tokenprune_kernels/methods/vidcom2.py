"""VidCom2 (arXiv 2505.14454): keep what is unlike its frame and the video, more of the frames that are unlike it."""

import torch
from torch import Tensor

from .._masks import indices_to_mask
from ..ops import gather_compact, mask_to_indices, merge_tokens, select_grouped_topk, select_topk
from ._common import Selection, check_count, check_visual
from ._method import Method, Stage

TEMPERATURE = 0.01  # of the softmax over frames
WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # of the Gaussians


@torch.no_grad()
def vidcom2(
    features: Tensor,
    groups: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """VidCom2 (arXiv 2505.14454), video compression commander, as in vLLM; before the language model.

    1. Channels: the max(1, C // 2) with the lowest variance over all tokens; u are the normalised rows of those alone.
    2. Redundancy s = G(u, g) + G(u, g_t): g is the mean of all u, g_t that of frame t, and
       G(u, c) = sum over a in 1/8, 1/4, 1/2, 1, 2 of exp(-||u - c||^2 / (2 a)).
    3. Budgets: z_t = -mean of G(u, g) over frame t, w = softmax of z / 0.01 over the frames. With the rate
       r = K / V, k_t = clamp(round(min(1, r (1 + w_t - 1 / T)) n_t), 1, n_t), n_t tokens in frame t.
    4. Of each frame the k_t smallest s. When they are more than K, the largest s of all frames go; when they are fewer,
       the smallest s of the rest come in.

    features [B, V, C] are the projector's outputs, frame after frame; groups [B, V] int64: the frame of a token, in
    [0, V); mask [B, V] marks real tokens, all by default. T counts the frames that have one. The engine keeps
    K = max(T, floor(V (1 - q))) at a pruning rate q. The returned indices are positions among the V visual tokens.

    Where it comes from. The steps are vLLM's, which names the authors' code as its source. Its statistics are in the
    dtype of the model, so that in bfloat16 ties decide; here they are float32 (float64 for float64). There, r is
    1 - q, which is K / V up to rounding where T does not set K. Ours: frames may have different sizes, ties go to the
    lower index, and nothing waits for the device.

    details: redundancy [B, V], budgets [B, V], the k_t of each frame, 0 behind the last.

    >>> import torch
    >>> from tokenprune_kernels.methods import vidcom2
    >>> still, moved = [1.0, 0.0], [0.0, 1.0]
    >>> video = torch.tensor([still, still, moved, still, still, still])  # two frames of three tokens
    >>> video = torch.cat([video, 9 * torch.eye(6)[:, :2]], 1)  # channels that vary more are not looked at
    >>> vidcom2(video[None], torch.tensor([[0, 0, 0, 1, 1, 1]]), 1).indices
    tensor([[2]])
    """
    check_count("vidcom2", k)
    batch, tokens, channels = features.shape
    check_visual("vidcom2", "groups", groups, batch, tokens)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    real = torch.ones_like(groups, dtype=torch.bool) if mask is None else mask
    real = real & (groups >= 0) & (groups < tokens)
    wide = torch.where(real.unsqueeze(-1), wide, 0)
    weight = real.to(wide.dtype)
    count = weight.sum(1, keepdim=True)
    share = (weight / count.clamp_min(1)).unsqueeze(1)  # of a token in the mean of all, [B, 1, V]

    # Two passes, because a channel may vary little around a large mean.
    variance = (share @ (wide - share @ wide).square()).squeeze(1)
    narrow, _ = select_topk(variance, max(1, channels // 2), largest=False, backend=backend)
    (unit,) = gather_compact([wide], narrow, dims=[2], backend=backend)
    unit = torch.nn.functional.normalize(unit, dim=-1)

    # T is not known here, but it is no more than V: a slot for every frame that there could be.
    frame = torch.where(real, groups, -1)
    slots = torch.arange(tokens, device=groups.device).expand(batch, -1)
    of_video = _likeness(unit, share @ unit)
    mean, size, _ = merge_tokens(unit, slots, assignment=frame, backend=backend)
    (centre,) = gather_compact([mean], frame, dims=[1], backend=backend)
    redundancy = of_video + _likeness(unit, centre)
    likeness, _, _ = merge_tokens(of_video.unsqueeze(-1), slots, assignment=frame, backend=backend)

    budgets = _budgets(likeness.squeeze(-1), size, k / count.clamp_min(1))
    kept, _ = select_grouped_topk(redundancy, groups, budgets, tokens, mask=real, largest=False, backend=backend)
    is_kept = indices_to_mask(kept, tokens)
    best, counts = select_topk(redundancy, k, mask=real & is_kept, largest=False, backend=backend)
    more, _ = select_topk(redundancy, k, mask=real & ~is_kept, largest=False, budgets=k - counts, backend=backend)
    indices, counts = mask_to_indices(indices_to_mask(torch.cat([best, more], 1), tokens), k, backend=backend)
    return Selection(indices, counts, {"redundancy": redundancy, "budgets": budgets})


def _likeness(unit: Tensor, centre: Tensor) -> Tensor:
    """G(u, c) [B, V]."""
    square = (unit - centre).square().sum(-1, keepdim=True)
    return torch.exp(square / square.new_tensor([-2 * a for a in WIDTHS])).sum(-1)


def _budgets(likeness: Tensor, size: Tensor, rate: Tensor) -> Tensor:
    """k_t [B, V] from the mean likeness of a frame to the video, its size (0: there is no such frame), and the rate."""
    exists = size > 0
    frames = exists.sum(1, keepdim=True).clamp_min(1)
    z = torch.where(exists, -likeness, -torch.inf)
    weight = torch.where(exists, torch.softmax(z / TEMPERATURE, 1), 0)
    scale = (rate * (1 + weight - 1 / frames)).clamp_max(1)
    # A frame of NaN has a budget all the same.
    due = (scale * size).round().nan_to_num(1.0)
    return torch.where(exists, torch.minimum(due.clamp_min(1), size), 0).long()


VIDCOM2 = Method(
    "vidcom2",
    (Stage(vidcom2, "model"),),
    title="VidCom2",
    summary="what is unlike its frame and the video; of an image, what is unlike it",
    paper="2505.14454",
    source="vLLM's implementation, which names the authors' code",
    within_images=False,
)
