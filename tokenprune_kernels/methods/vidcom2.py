"""VidCom2 (arXiv 2505.14454): keep what is unlike its frame and the video, more of the frames that are unlike it."""

import torch
from torch import Tensor

from .._masks import indices_to_mask
from .._op import Budget
from ..ops import gather_compact, mask_to_indices, merge_tokens, select_grouped_topk, select_topk
from ._calls import called_like_ops
from ._common import Selection, check_count, check_ratio, check_visual
from ._method import Method, Stage

TEMPERATURE = 0.01  # of the softmax over frames
WIDTHS = (-3, 1)  # of the Gaussians, from 1/8 to 2, as powers of 2


@called_like_ops
def vidcom2(
    features: Tensor,
    groups: Tensor,
    k: Budget,
    *,
    rate: float | None = None,
    frames: int | None = None,
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
    [0, frames); mask [B, V] marks real tokens, all by default. frames: at most so many frames in a sample, V when it is
    not known; the means of the frames take that much memory. T counts the frames that have a token. rate: r, where it
    is not K / V. The returned indices are positions among the V visual tokens.

    Where it comes from. The steps are vLLM's, which names the authors' code as its source. Its statistics are in the
    dtype of the model, so that in bfloat16 ties decide; here they are float32 (float64 for float64). At a pruning rate
    q the engine keeps K = max(T, floor(V (1 - q))), and r is 1 - q, which is K / V up to rounding where T does not set
    K. Ours: frames may have different sizes, ties go to the lower index, and nothing waits for the device.

    details: redundancy [B, V], budgets [B, frames], the k_t of each frame, 0 behind the last.

    >>> import torch
    >>> from tokenprune_kernels.methods import vidcom2
    >>> still, moved = [1.0, 0.0], [0.0, 1.0]
    >>> video = torch.tensor([still, still, moved, still, still, still])  # two frames of three tokens
    >>> video = torch.cat([video, 9 * torch.eye(6)[:, :2]], 1)  # channels that vary more are not looked at
    >>> vidcom2(video[None], torch.tensor([[0, 0, 0, 1, 1, 1]]), 1).indices
    tensor([[2]])
    """
    k = check_count("vidcom2", k)
    check_count("vidcom2", 0 if frames is None else frames, "frames")
    check_ratio("vidcom2", "rate", 1.0 if rate is None else rate)
    batch, tokens, channels = features.shape
    check_visual("vidcom2", "groups", groups, batch, tokens)
    # T is known on the device alone, but it is no more than V: a slot for every frame that there could be.
    slots = torch.arange(tokens if frames is None else min(frames, tokens), device=groups.device).expand(batch, -1)
    real = torch.ones_like(groups, dtype=torch.bool) if mask is None else mask
    real = real & (groups >= 0) & (groups < slots.shape[1])
    dtype = torch.promote_types(features.dtype, torch.float32)
    masked = ~real.unsqueeze(-1)
    weight = real.to(dtype)
    count = weight.sum(1, keepdim=True)
    share = (weight / count.clamp_min(1)).unsqueeze(1)  # of a token in the mean of all, [B, 1, V]

    # Two passes, because a channel may vary little around a large mean. What has the size of the features is made once
    # and changed in place: fresh memory costs more than the arithmetic.
    square = features.to(dtype, copy=True).masked_fill_(masked, 0)
    square.sub_(share @ square).square_()
    narrow, _ = select_topk((share @ square).squeeze(1), max(1, channels // 2), largest=False, backend=backend)
    (unit,) = gather_compact([features], narrow, dims=[2], backend=backend)
    unit = unit.to(dtype).masked_fill_(masked, 0)
    unit /= unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    frame = torch.where(real, groups, -1)
    of_video = _likeness(unit - share @ unit)
    mean, size, _ = merge_tokens(unit, slots, assignment=frame, backend=backend)
    (centre,) = gather_compact([mean], frame, dims=[1], backend=backend)
    redundancy = of_video + _likeness(centre.sub_(unit))
    likeness, _, _ = merge_tokens(of_video.unsqueeze(-1), slots, assignment=frame, backend=backend)

    budgets = _budgets(likeness.squeeze(-1), size, k / count.clamp_min(1) if rate is None else rate)
    kept, _ = select_grouped_topk(redundancy, groups, budgets, tokens, mask=real, largest=False, backend=backend)
    is_kept = indices_to_mask(kept, tokens)
    best, counts = select_topk(redundancy, k, mask=real & is_kept, largest=False, backend=backend)
    more, _ = select_topk(redundancy, k, mask=real & ~is_kept, largest=False, budgets=k - counts, backend=backend)
    indices, counts = mask_to_indices(indices_to_mask(torch.cat([best, more], 1), tokens), k, backend=backend)
    return Selection(indices, counts, {"redundancy": redundancy, "budgets": budgets})


def _likeness(difference: Tensor) -> Tensor:
    """G [B, V] of the differences [B, V, C], which are overwritten."""
    square = difference.square_().sum(-1, keepdim=True)
    # Made on the device, which would be waited for if they came from the host.
    width = torch.arange(WIDTHS[0], WIDTHS[1] + 1, dtype=square.dtype, device=square.device).exp2()
    return torch.exp(square / (-2 * width)).sum(-1)


def _budgets(likeness: Tensor, size: Tensor, rate: Tensor | float) -> Tensor:
    """k_t [B, frames] from a frame's mean likeness to the video, its size (0: there is no such frame), and the rate."""
    exists = size > 0
    number = exists.sum(1, keepdim=True).clamp_min(1)
    z = torch.where(exists, -likeness, -torch.inf)
    weight = torch.where(exists, torch.softmax(z / TEMPERATURE, 1), 0)
    scale = (rate * (1 + weight - 1 / number)).clamp_max(1)
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
