"""EVS and VidCom2 as vLLM and SGLang call them: one video, its pruning rate, and a mask of the tokens that stay.

Both engines have a function `compute_retention_mask(video_embeds, video_size_thw, spatial_merge_size, q)` for the mask
and `compute_retained_tokens_count(tokens_per_frame, num_frames, q)` for the number of tokens, which sizes the prompt
long before the features exist. The mask must have exactly that many, so the engine's own function is asked here too.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._masks import indices_to_mask
from ..methods import Selection, evs, vidcom2

MASK, COUNT = "compute_retention_mask", "compute_retained_tokens_count"
PARAMETERS = {
    MASK: ["video_embeds", "video_size_thw", "spatial_merge_size", "q"],
    COUNT: ["tokens_per_frame", "num_frames", "q"],
}
Count = Callable[..., int]
Size = Tensor | tuple[int, int, int]
Retention = Callable[..., Tensor]


def evs_retention(count: Count) -> Retention:
    """`compute_retention_mask` of EVS; `count` is the engine's number of tokens.

    >>> import torch
    >>> def count(tokens_per_frame, num_frames, q):
    ...     return max(tokens_per_frame, int(tokens_per_frame * num_frames * (1 - q)))
    >>> video = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])  # two frames of two tokens
    >>> evs_retention(count)(video, (2, 1, 2), spatial_merge_size=1, q=0.25)
    tensor([ True,  True, False,  True])
    """

    def compute_retention_mask(video_embeds: Tensor, video_size_thw: Size, spatial_merge_size: int, q: float) -> Tensor:
        video = _video(video_embeds, video_size_thw, spatial_merge_size)
        k = count(tokens_per_frame=video.area, num_frames=video.frames, q=q)
        return _mask(evs(video.features, video.groups, k, grid=video.grid), video)

    return compute_retention_mask


def vidcom2_retention(count: Count) -> Retention:
    """`compute_retention_mask` of VidCom2; `count` is the engine's number of tokens.

    >>> import torch
    >>> def count(tokens_per_frame, num_frames, q):
    ...     return max(num_frames, int(tokens_per_frame * num_frames * (1 - q)))
    >>> still, moved = [1.0, 0.0], [0.0, 1.0]
    >>> video = torch.tensor([still, still, moved, still, moved, moved])  # two frames of three tokens
    >>> video = torch.cat([video, 9 * torch.eye(6)[:, :2]], 1)  # channels that vary more are not looked at
    >>> vidcom2_retention(count)(video, (2, 1, 3), spatial_merge_size=1, q=0.6)
    tensor([False, False,  True,  True, False, False])
    """

    def compute_retention_mask(video_embeds: Tensor, video_size_thw: Size, spatial_merge_size: int, q: float) -> Tensor:
        video = _video(video_embeds, video_size_thw, spatial_merge_size)
        k = count(tokens_per_frame=video.area, num_frames=video.frames, q=q)
        return _mask(vidcom2(video.features, video.groups, k, rate=1 - q, frames=video.frames), video)

    return compute_retention_mask


def engine_function(caller: str, module: str, name: str) -> Callable[..., Any]:
    """A function of an engine, whose parameters are those of `PARAMETERS`.

    Raises NotImplementedError, with what was looked for and what is there, when it has others or does not exist.
    """
    wanted = f"{caller}: expected {module}.{name}({', '.join(PARAMETERS[name])})"
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(function).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise NotImplementedError(f"{wanted}, got {type(error).__name__}: {error}; nothing was changed") from error
    # With its default, which a caller may rely on, and without its annotation, which no caller sees.
    got = [str(p.replace(annotation=p.empty)) for p in parameters]
    if got != PARAMETERS[name]:
        raise NotImplementedError(f"{wanted}, got {name}({', '.join(got)}); nothing was changed")
    return function


class _Video(NamedTuple):
    features: Tensor  # [1, V, C], frame after frame
    groups: Tensor  # [1, V], the frame of a token
    frames: int
    grid: tuple[int, int]  # of a frame, after merging

    @property
    def area(self) -> int:
        return self.grid[0] * self.grid[1]


def _video(embeds: Tensor, size: Size, merge: int) -> _Video:
    # One copy to the host if the size lies on a GPU, instead of one for each of its numbers.
    frames, height, width = map(int, size.tolist() if isinstance(size, Tensor) else size)
    grid = (height // merge, width // merge)
    groups = torch.arange(frames, device=embeds.device).repeat_interleave(grid[0] * grid[1])
    return _Video(embeds.reshape(1, len(groups), embeds.shape[-1]), groups.unsqueeze(0), frames, grid)


def _mask(kept: Selection, video: _Video) -> Tensor:
    return indices_to_mask(kept.indices, video.features.shape[1])[0]
