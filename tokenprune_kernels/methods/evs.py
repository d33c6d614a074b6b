"""EVS (arXiv 2510.14624): keep the tokens of a video that changed since the frame before."""

import torch
from torch import Tensor

from .._op import Budget
from ..ops import gather_compact, paired_cosine, select_topk
from ._calls import called_like_ops
from ._common import Grid, Selection, check_count, check_visual, grid_sides
from ._method import Method, Stage

FIRST_FRAME = 255.0  # above every dissimilarity: a first frame is kept before anything else


@called_like_ops
def evs(
    features: Tensor,
    groups: Tensor,
    k: Budget,
    *,
    grid: Grid,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """EVS (arXiv 2510.14624), efficient video sampling, as in vLLM; before the language model.

    1. s(t, p) = 1 - cos(x(t, p), x(t - 1, p)): how much token p of frame t differs from the same token one frame
       earlier; 255 in a frame without a predecessor.
    2. Keep the K largest s of all frames together; equal ones from the lower index on.

    features [B, V, C] are the projector's outputs, frame after frame. groups [B, V] int64: the frame of a token. grid:
    (h, w) of a frame after merging, [B, 2] when samples differ, or [B, V, 2] when the frames of a sample do; a frame
    after one of another size counts as a first one. mask [B, V] marks real tokens. The engine keeps
    K = max(h w, floor(T h w (1 - q))) of T frames at a pruning rate q. The returned indices are positions among the V
    visual tokens.

    Where it comes from. The steps are vLLM's, which everybody runs; the paper's text describes differences of pixels
    instead. There, the cosine is rounded to the dtype of the model, so that in bfloat16 most slow changes are ties,
    which go to the early frames; here bfloat16 inputs are compared exactly, which keeps what float64 keeps. NaN comes
    last.

    details: dissimilarity [B, V].

    >>> import torch
    >>> from tokenprune_kernels.methods import evs
    >>> video = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])  # two frames of two tokens
    >>> evs(video[None], torch.tensor([[0, 0, 1, 1]]), 3, grid=(1, 2)).indices
    tensor([[0, 1, 3]])
    """
    k = check_count("evs", k)
    batch, tokens, _ = features.shape
    check_visual("evs", "groups", groups, batch, tokens)
    height, width = grid_sides("evs", grid, batch, tokens)
    index = torch.arange(tokens, device=features.device)
    area = (torch.zeros_like(groups) + height * width).long()
    before = index - area
    has_one = (before >= 0) & (before < index)
    before = torch.where(has_one, before, 0)
    has_one = has_one & (groups.gather(1, before) == groups - 1) & (area.gather(1, before) == area)
    if isinstance(grid, Tensor):
        (previous,) = gather_compact([features], before, dims=[1], backend=backend)
        cosine = paired_cosine(features, previous, backend=backend)
    else:  # Frames of one size: both arguments are views of the features, and nothing is copied.
        step = min(grid[0] * grid[1], tokens)
        cosine = paired_cosine(features[:, step:], features[:, : tokens - step], backend=backend)
        cosine = torch.nn.functional.pad(cosine, (step, 0))
    dissimilarity = torch.where(has_one, 1 - cosine, FIRST_FRAME)
    indices, counts = select_topk(dissimilarity, k, mask=mask, backend=backend)
    return Selection(indices, counts, {"dissimilarity": dissimilarity})


EVS = Method(
    "evs",
    (Stage(evs, "model"),),
    title="EVS",
    summary="change since the frame before; an image is its first rows",
    paper="2510.14624",
    source="vLLM's implementation",
    within_images=False,
)
