"""Qwen2.5-VL and Qwen3-VL in the engine: images whose kept tokens have the positions that they had among all.

The engine asks for the positions of a prompt before its images are encoded, and says which tokens stay only afterwards.
As it does for its own pruning of videos, the encoder hands positions on in further channels of the embeddings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..transformers.layout import grid_patches
from .checks import check_method
from .images import chooser_of, prune_images

# The smallest positive share of videos to drop: the engine then hands positions on, and 1 minus it is 1.
_NOTHING = 5e-324
_BASE = 128  # digits of a row and a column: whole numbers up to 256 are exact in bfloat16
_CHANNELS = 4


def check_mrope(model: type, processor: type) -> None:
    check_method(model, "_postprocess_image_embeds_evs", "image_embeds_split", "image_input")
    check_method(model, "get_mrope_input_positions", "input_tokens", "mm_features")
    check_method(
        model, "recompute_mrope_positions", "input_ids", "multimodal_embeddings", "mrope_positions",
        "num_computed_tokens",
    )  # fmt: skip
    check_method(processor, "_get_mm_hashes", "inputs")
    check_method(processor, "_get_prompt_updates", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs")


class ImagesOnly:
    """Comes in front of the engine's processing info: at most 0 videos may be in a prompt."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {**super().get_supported_mm_limits(), "video": 0}  # type: ignore[misc]


class PrunedQwen:
    """Comes in front of one of the engine's models."""

    supports_tower_connector_lora = False  # for which the engine counts the tower's tokens by the placeholders
    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        choose = chooser_of(vllm_config)
        name = vllm_config.model_config.architecture
        if choose.reads_saliency:
            raise NotImplementedError(
                f"tokenprune_kernels: {choose.setting.method} reads the vision tower's attention, and that of {name} "
                "is not read; choose a method that goes by features and positions"
            )
        multimodal = vllm_config.model_config.multimodal_config
        if (multimodal.video_pruning_rate or _NOTHING) != _NOTHING:
            raise NotImplementedError(
                f"tokenprune_kernels: images of {name} are pruned, and its videos refused; leave out "
                "--video-pruning-rate"
            )
        multimodal.video_pruning_rate = _NOTHING
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.choose = choose

    def _merged_grid(self, grid: Any) -> tuple[int, int]:
        merge = self.config.vision_config.spatial_merge_size
        _, height, width = (int(side) for side in grid)
        return height // merge, width // merge

    def _postprocess_image_embeds_evs(self, image_embeds_split: Sequence[Tensor], image_input: Any) -> Any:
        """[K, C + channels] of each image from [V, C]: the kept tokens, with row and column of each."""
        grids = [self._merged_grid(grid) for grid in image_input["image_grid_thw"].tolist()]
        channels = getattr(self, "visual_dim", image_embeds_split[0].shape[1])  # DeepStack's features are behind them
        kept = prune_images(
            self.choose,
            [embeds[:, :channels] for embeds in image_embeds_split],
            lambda: [[grid_patches(height, width, 0)] for height, width in grids],
            _no_saliency,
        )
        return tuple(
            torch.cat([rows, embeds[indices, channels:], _digits(indices, width).to(embeds.dtype)], 1)
            for (indices, rows), embeds, (_, width) in zip(kept, image_embeds_split, grids, strict=True)
        )

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        images = [
            (each.mm_position.offset, each.mm_position.length, max(self._merged_grid(each.data["image_grid_thw"].data)))
            for each in mm_features
        ]
        return first_positions(len(input_tokens), sorted(images))

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        positions = with_images(
            ids == self.config.image_token_id,
            [embeds[:, -_CHANNELS:].to(mrope_positions.device) for embeds in multimodal_embeddings],
            mrope_positions,
            num_computed_tokens,
        )
        return (
            [embeds[:, :-_CHANNELS] for embeds in multimodal_embeddings],
            positions,
            int(positions.max()) + 1 - len(ids),
        )


def _no_saliency() -> Sequence[Tensor]:
    raise RuntimeError("there is no saliency of this family")


def _digits(indices: Tensor, width: int) -> Tensor:
    """[K, 4]: row and column of tokens on a grid, two digits each."""
    row, column = indices // width, indices % width
    return torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], 1)


def first_positions(length: int, images: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """The positions [3, length] of a prompt, and what is to be added to a later column to have its position.

    images: of each, in their order, its first column, its columns, and the longer side of its grid. All tokens of an
    image have its first position until they are encoded; text goes on behind the whole grid, whatever is kept of it.
    """
    positions = torch.empty(3, length, dtype=torch.int64)
    column = position = 0
    for first, count, side in [*images, (length, 0, 0)]:
        positions[:, column:first] = torch.arange(position, position + first - column)
        position += first - column
        column = first + count
        positions[:, first:column] = position
        position += side
    return positions, position - length


def with_images(is_image: Tensor, digits: Sequence[Tensor], positions: Tensor, computed: int) -> Tensor:
    """The positions [3, L] with those of the images' tokens that are encoded, from column `computed` on.

    is_image [L]. digits [K, 4] of each image or part of one. An image has one time, its first position, which is that
    of its tokens before and after: done again, it changes nothing.
    """
    if not digits:
        return positions
    given = torch.cat(list(digits)).long()
    local = torch.stack([given[:, i] * _BASE + given[:, i + 1] for i in (0, 2)])
    columns = is_image[computed:].nonzero().squeeze(1)[: local.shape[1]] + computed
    positions = positions.clone()
    positions[1:, columns] = positions[0, columns] + local.to(positions.dtype)
    return positions
