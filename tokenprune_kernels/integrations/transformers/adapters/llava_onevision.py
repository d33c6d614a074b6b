"""LLaVA-OneVision: crops of images as in LLaVA-NeXT, shrunk when they are many, and pooled frames; no class token."""

from typing import Any

import torch
from torch import Tensor

from ....ops import cross_attention_scores
from ..families import Family, Inputs, Layout, Model, Patches, Saliency, grid_patches, register_family
from .llava import PAPER_LAYERS, core_of, decoder_of
from .packing import Pack, packed_pictures, packed_scores
from .pictures import Picture, layout_of_pictures, values_of_pictures


def frames_seen(arguments: dict[str, Any]) -> tuple[int, int]:
    """Videos and frames of each."""
    # In transformers 5.3 and thereabouts the pixels of a video were called those of an image.
    pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    assert pixels is not None
    return int(pixels.shape[0]), int(pixels.shape[1])


def encoded(inputs: Inputs) -> tuple[Pack | None, tuple[int, int] | None]:
    pack, videos = inputs.get("pack_image_features"), inputs.get("get_video_features")
    if pack is None and videos is None:
        raise NotImplementedError("prune_visual_tokens: encode the pictures inside the block, their sizes are needed")
    return pack, videos


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """Every crop and every frame is a group of its own."""
    pack, videos = encoded(inputs)
    pictures: dict[int, list[Picture]] = {}
    if pack is not None:
        pictures[core.config.image_token_id] = packed_pictures(core, pack)
    if videos is not None:
        pictures[core.config.video_token_id] = [_video(core, videos[1]) for _ in range(videos[0])]
    return layout_of_pictures(pictures, inputs, counts)


def _video(core: Model, frames: int) -> Picture:
    """The frames on their pooled grids, and one newline, beside the last row of the last frame."""
    vision = core.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    side = round(core.apply_pooling(torch.zeros(1, patches, 1)).shape[1] ** 0.5)
    parts = [grid_patches(side, side, frame) for frame in range(frames)]
    last = parts[-1]
    positions = torch.cat([last.positions, torch.tensor([[side - 1.0, side]])])
    boxes = torch.cat([last.boxes, torch.tensor([[1.0, 1 - 1 / side, 1.0, 1.0]])])
    return Picture([*parts[:-1], Patches(positions, last.grid, boxes, last.image)])


class ReceivedAttention(Saliency):
    """The attention a patch receives in the layer whose features the model takes, averaged over heads and queries.

    Shrunk and pooled like the features; newline tokens have none.
    """

    def __init__(self, core: Model) -> None:
        tower = core.vision_tower
        layers: Any = getattr(tower, "vision_model", tower).encoder.layers
        chosen = core.config.vision_feature_layer
        last = chosen if isinstance(chosen, int) else chosen[-1]
        super().__init__(core.config.vision_config, layers[last if last < 0 else last - 1].self_attn)

    def see(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]) -> None:
        with torch.no_grad():
            self.seen.append(cross_attention_scores(query, key, scale=scale, query_reduction="mean")[0])

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        pack, videos = encoded(inputs)
        # Images are encoded first.
        runs = self.seen[-((pack is not None) + (videos is not None)) :]
        values: dict[int, list[Tensor]] = {}
        if pack is not None:
            values[core.config.image_token_id] = packed_scores(core, pack, runs[0])
        if videos is not None:
            pooled = core.apply_pooling(runs[-1].float().unsqueeze(-1)).squeeze(-1)  # [frames, tokens]
            each = pooled.unflatten(0, videos).flatten(1)
            values[core.config.video_token_id] = list(torch.nn.functional.pad(each, (0, 1)))
        return values_of_pictures(values, inputs, counts)


register_family(
    Family(
        name="LLaVA-OneVision",
        core=core_of,
        decoder=decoder_of,
        visual_ids=lambda config: (config.image_token_id, config.video_token_id),
        layout=layout,
        saliency=ReceivedAttention,
        layers=PAPER_LAYERS,
        watched={"pack_image_features": Pack.seen, "get_video_features": frames_seen},
    ),
    "llava_onevision",
)
