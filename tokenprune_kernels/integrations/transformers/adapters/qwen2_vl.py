"""Qwen2-VL and Qwen2.5-VL: images and frames of any size, merged 2 x 2 behind a tower without a class token."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import (
    Family,
    Inputs,
    Layout,
    Model,
    Saliency,
    beam_copies,
    by_sample,
    grid_patches,
    layout_of,
    register_family,
)
from .llava import core_of, decoder_of
from .towers import received_attention

# COAST's layer is meant for the 28 layers of the 7B model; the other papers name none for this family.


@dataclass(frozen=True)
class Frame:
    """A picture, or the frames of a video that are encoded together, with the size of its merged grid."""

    video: bool
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


def visual_ids(config: Any) -> tuple[int, ...]:
    return config.image_token_id, config.video_token_id


def frames_of(core: Model, inputs: Inputs, counts: list[int]) -> list[list[Frame]]:
    """The frames of each sample in the order of the prompt, whatever text stands between them.

    generate of newer versions encodes the pictures before the first forward and keeps their sizes for itself. It
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
    places = positions[-2:].cpu().expand(-1, len(counts), -1)  # row and column, from the same offset
    samples = []
    for b in range(len(counts)):
        column = visual[b].nonzero().squeeze(1)
        row_step, column_step = places[:, b, column].diff(dim=1)
        adjacent = column.diff() == 1
        walks = ((row_step == 0) & (column_step == 1)) | ((row_step == 1) & (column_step <= 0))
        if bool((adjacent & (row_step > 0) & (column_step > 0)).any()):  # they count as text does
            raise _no_geometry()
        ends = [*(1 + (~(adjacent & walks)).nonzero().squeeze(1)).tolist(), len(column)]
        frames, start = [], 0
        for end in ends if len(column) else []:
            rows, columns = places[:, b, column[start:end]]
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
    """A group and a picture for every image and for every frame of a video."""
    samples = [
        [grid_patches(frame.height, frame.width, place) for place, frame in enumerate(frames)]
        for frames in frames_of(core, inputs, counts)
    ]
    return layout_of(samples, max(counts, default=0))


class ReceivedAttention(Saliency):
    """The attention that a patch receives within its image or frame, the mean over heads and queries.

    There is no class token. In the last layer that attends over whole images; averaged over the patches of a token.
    """

    def __init__(self, core: Model) -> None:
        tower = core.visual
        whole = getattr(tower, "fullatt_block_indexes", None) or [len(tower.blocks) - 1]
        super().__init__(tower.config, tower.blocks[max(whole)].attn)

    def see(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]) -> None:
        ends = keywords.get("cu_seq_lens_q")  # FlashAttention takes all frames at once
        lengths = [query.shape[2]] if ends is None else ends.diff().tolist()
        self.seen.append(received_attention(query, key, scale, lengths))

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        tower = core.visual
        shown = torch.cat(self.seen) if self.seen else torch.zeros(0)
        values = shown.unflatten(0, (-1, tower.spatial_merge_size**2)).mean(1)
        copies = beam_copies(len(values), counts)
        prompt = [frame for frames in frames_of(core, inputs, counts)[::copies] for frame in frames]
        # The tower runs over all images first, then over all videos.
        order = sorted(range(len(prompt)), key=lambda place: prompt[place].video)
        seen = [prompt[place] for place in order]
        values = values[len(values) - sum(frame.tokens for frame in seen) :]
        window_index = _window_index(tower, seen)
        if window_index is not None:
            values = values[window_index.to(values.device).argsort()]
        stretches = values.split([frame.tokens for frame in seen])
        by_place = dict(zip(order, stretches, strict=True))
        return by_sample(torch.cat([by_place[place] for place in range(len(prompt))]), counts)


def _window_index(tower: Model, frames: list[Frame]) -> Tensor | None:
    """Which token stands at a place while the tower runs; None: in the order of the prompt."""
    if not hasattr(tower, "window_size"):
        return None
    merge = tower.spatial_merge_size
    grid = torch.tensor([[1, frame.height * merge, frame.width * merge] for frame in frames])
    function = getattr(sys.modules[type(tower).__module__], "get_vision_window_index", None)
    if function is None:  # until transformers 5.11 or so
        index, _ = tower.get_window_index(grid)
    else:
        index, _ = function(grid, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size)
    return torch.as_tensor(index)


register_family(
    Family(
        name="Qwen2-VL",
        core=core_of,
        decoder=decoder_of,
        visual_ids=visual_ids,
        layout=layout,
        saliency=ReceivedAttention,
        renumber=False,
    ),
    "qwen2_vl",
    "qwen2_5_vl",
)
