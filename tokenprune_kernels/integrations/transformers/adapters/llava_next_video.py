"""LLaVA-NeXT-Video: crops of images as in LLaVA-NeXT, and frames whose patches are pooled in square windows."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..families import Family, Inputs, Model, Saliency
from ..layout import Patches, grid_patches
from .packing import Pack, packed_images, packed_scores
from .towers import attention_of, patch_scores, window_means
from .videos import frames_seen, layout, saliency

WATCHED: dict[str, Callable[[Inputs], Any]] = {
    "pack_image_features": Pack.seen, "get_video_features": frames_seen,
}  # fmt: skip


def _side(core: Model) -> int:
    """Patches in a row of a frame: the model's pooler takes frames for squares of this side."""
    vision = core.config.vision_config
    return int(vision.image_size // vision.patch_size)


def video(core: Model, frames: int) -> list[Patches]:
    """Rows and columns of patches that fill no window are seen by no token."""
    side, stride = _side(core), core.config.spatial_pool_stride
    pooled = side // stride
    seen = pooled * stride / side
    return [grid_patches(pooled, pooled, frame, (0, 0, seen, seen)) for frame in range(frames)]


def video_scores(core: Model, scores: Tensor) -> Tensor:
    return window_means(scores, _side(core), core.config.spatial_pool_stride).flatten()


FAMILIES = (
    Family(
        name="LLaVA-NeXT-Video",
        model_types=("llava_next_video",),
        layout=partial(layout, watched=WATCHED, images=packed_images, video=video),
        grid="a thumbnail and crops as in LLaVA-NeXT; frames pooled in windows of `spatial_pool_stride`, a group each",
        saliency=Saliency(
            "class token's row of each crop, packed alike, and of each frame, its mean over a window; SigLIP: mean "
            "attention received",
            attention_of, patch_scores,
            partial(saliency, watched=WATCHED, images=packed_scores, video=video_scores),
        ),
        visual_tokens=("image_token_id", "video_token_id"),
        encoders=("get_image_features", "get_video_features"),
        watched=WATCHED,
    ),
)  # fmt: skip
