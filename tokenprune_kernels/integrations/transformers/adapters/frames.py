"""Images and frames of any size, merged 2 x 2 behind a tower without a class token, as Qwen-VL and GLM-V have them.

Where their tokens lie, how salient the tower makes them, and what the descriptions of such families have in common.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..families import Family, Inputs, Model, Saliency
from ..layout import Layout, grid_patches, layout_of
from .images import beam_copies, by_sample
from .towers import received_attention


@dataclass(frozen=True)
class Frame:
    """An image, or the frames of a video that are encoded together, with the size of its merged grid."""

    video: bool
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


def frames_of(core: Model, inputs: Inputs, counts: list[int]) -> list[list[Frame]]:
    """The frames of each sample in the order of the prompt, whatever text stands between them.

    generate of newer versions encodes the images before the first forward and keeps their sizes for itself. It
    hands the positions on, and those of an image walk over its grid.
    """
    grids = {video: inputs.get(name) for video, name in ((False, "image_grid_thw"), (True, "video_grid_thw"))}
    if any(grid is not None for grid in grids.values()):
        return _frames_of_grids(core, inputs, grids, counts)
    positions = inputs.get("position_ids")
    if positions is None or positions.dim() != 3:
        raise _no_geometry()
    return _frames_of_positions(core, inputs, positions, counts)


def _no_geometry() -> ValueError:
    return ValueError(
        "prune_visual_tokens: the sizes of the images are unknown: pass mm_token_type_ids, image_grid_thw and "
        "video_grid_thw as the processor returns them"
    )


def _visual_columns(core: Model, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """[B, L] on the host: which columns are visual tokens, and which of those of a video."""
    ids: Tensor = inputs["input_ids"].cpu()
    video = ids == core.config.video_token_id
    visual = video | (ids == core.config.image_token_id)
    mask = inputs.get("attention_mask")
    return (visual if mask is None else visual & mask.bool().cpu()), video


def _frames_of_grids(
    core: Model, inputs: Inputs, grids: dict[bool, Tensor | None], counts: list[int]
) -> list[list[Frame]]:
    merge = core.visual.spatial_merge_size
    waiting = {
        video: [
            Frame(video, height // merge, width // merge)
            for times, height, width in ([] if grid is None else grid.tolist())
            for _ in range(times)
        ][::-1]
        for video, grid in grids.items()
    }
    kinds: list[Tensor] | None = None
    if all(waiting.values()):
        visual, video = _visual_columns(core, inputs)
        kinds = [v[columns] for v, columns in zip(video, visual, strict=True)]
    only = bool(waiting[True])
    samples = []
    for b, count in enumerate(counts):
        frames: list[Frame] = []
        start = 0
        while start < count:
            left = waiting[only if kinds is None else bool(kinds[b][start])]
            if not left:
                raise ValueError("prune_visual_tokens: more visual tokens in the prompt than in the grids")
            frames.append(left.pop())
            start += frames[-1].tokens
        samples.append(frames)
    return samples


def _frames_of_positions(core: Model, inputs: Inputs, positions: Tensor, counts: list[int]) -> list[list[Frame]]:
    visual, video = _visual_columns(core, inputs)
    on_grid = positions[-2:].cpu().expand(-1, len(counts), -1)  # row and column, from the same offset
    samples = []
    for b in range(len(counts)):
        column = visual[b].nonzero().squeeze(1)
        row_step, column_step = on_grid[:, b, column].diff(dim=1)
        adjacent = column.diff() == 1
        walks = ((row_step == 0) & (column_step == 1)) | ((row_step == 1) & (column_step <= 0))
        if bool((adjacent & (row_step > 0) & (column_step > 0)).any()):  # they count as text does
            raise _no_geometry()
        ends = [*(1 + (~(adjacent & walks)).nonzero().squeeze(1)).tolist(), len(column)]
        frames, start = [], 0
        for end in ends if len(column) else []:
            rows, columns = on_grid[:, b, column[start:end]]
            frame = Frame(
                bool(video[b, column[start]]),
                int(rows.max() - rows.min()) + 1,
                int(columns.max() - columns.min()) + 1,
            )
            if frame.tokens != end - start:
                raise _no_geometry()
            frames.append(frame)
            start = end
        samples.append(frames)
    return samples


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Every image and every frame of a video is a group and an image of its own."""
    samples = [
        [grid_patches(frame.height, frame.width, number) for number, frame in enumerate(frames)]
        for frames in frames_of(core, inputs, counts)
    ]
    return layout_of(samples, max(counts, default=0))


def received(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs) -> Tensor:
    """[patches]: the attention that each receives within its image or frame. There is no class token."""
    ends = keywords.get("cu_seq_lens_q")  # FlashAttention takes all frames at once
    lengths = [query.shape[2]] if ends is None else ends.diff().tolist()
    return received_attention(query, key, scale, lengths)


def saliency(
    core: Model, inputs: Inputs, counts: list[int], seen: list[Any],
    order_of: Callable[[Model, list[Frame]], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The mean over the patches of a token. order_of: `window_order`, for a tower that reorders its tokens."""
    tower = core.visual
    values = torch.cat(seen).unflatten(0, (-1, tower.spatial_merge_size**2)).mean(1)
    copies = beam_copies(len(values), counts)
    prompt = [frame for frames in frames_of(core, inputs, counts)[::copies] for frame in frames]
    # The tower runs over all images first, then over all videos.
    order = sorted(range(len(prompt)), key=lambda index: prompt[index].video)
    frames = [prompt[index] for index in order]
    values = values[len(values) - sum(frame.tokens for frame in frames) :]
    if order_of is not None:
        values = values[order_of(tower, frames).to(values.device).argsort()]
    stretches = dict(zip(order, values.split([frame.tokens for frame in frames]), strict=True))
    return by_sample(torch.cat([stretches[index] for index in range(len(prompt))]), counts)


def window_order(tower: Model, frames: list[Frame]) -> Tensor:
    """Which token is at each index while the tower runs."""
    merge = tower.spatial_merge_size
    grid = torch.tensor([[1, frame.height * merge, frame.width * merge] for frame in frames])
    function = getattr(sys.modules[type(tower).__module__], "get_vision_window_index", None)
    if function is None:  # until transformers 5.11 or so
        index, _ = tower.get_window_index(grid)
    else:
        index, _ = function(grid, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size)
    return torch.as_tensor(index)


RECEIVED = Saliency(
    "mean attention received in the last block, per 2 x 2 merge",
    lambda core: core.visual.blocks[-1].attn, received, saliency,
)  # fmt: skip

WINDOWED = Saliency(
    "mean attention received in the last block with full attention, per 2 x 2 merge",
    lambda core: core.visual.blocks[max(core.visual.fullatt_block_indexes, default=-1)].attn,
    received, partial(saliency, order_of=window_order),
)  # fmt: skip

merged_family = partial(
    Family,
    layout=layout,
    grid="the merged grid of `image_grid_thw`, `video_grid_thw`; a group per frame",
    visual_tokens=("image_token_id", "video_token_id"),
    encoders=("get_image_features", "get_video_features"),
    layout_inputs=("input_ids", "attention_mask", "position_ids", "image_grid_thw", "video_grid_thw"),
    mrope=True,
)
