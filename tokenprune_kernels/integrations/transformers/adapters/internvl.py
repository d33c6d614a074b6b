"""InternVL3: tiles of an image and a thumbnail of all of it, each pixel-shuffled; a tower with a class token."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ....ops import cross_attention_scores
from ..families import (
    Family,
    Inputs,
    Layout,
    Model,
    Patches,
    Saliency,
    by_sample,
    grid_patches,
    layout_of,
    register_family,
)
from .llava import PAPER_LAYERS, core_of, decoder_of


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """A stretch of visual tokens is a picture: one tile or frame, or several tiles and the thumbnail behind them."""
    vision = core.config.vision_config
    pixels: Tensor | None = inputs.get("get_image_features")
    height = vision.image_size[0] if pixels is None else pixels.shape[-2]
    side = int(height // vision.patch_size[0] * core.config.downsample_ratio)
    columns = torch.nn.functional.pad((inputs["input_ids"] == core.config.image_token_id).long(), (1, 1))
    turns = columns.diff(dim=1).cpu()
    samples: list[list[Patches]] = []
    arranged: dict[int, tuple[int, int]] = {}  # by the first tile of a picture
    # Beams of one sample share its tiles, when generate has repeated it after encoding.
    total = sum(counts) // (side * side)
    copies = max(1, total // len(pixels)) if pixels is not None and len(pixels) else 1
    tile = 0
    for b, turn in enumerate(turns):
        patches: list[Patches] = []
        first_of_sample = tile
        starts, ends = (turn == 1).nonzero().flatten().tolist(), (turn == -1).nonzero().flatten().tolist()
        for image, (start, end) in enumerate(zip(starts, ends, strict=True)):
            tiles, rest = divmod(end - start, side * side)
            if rest:
                raise NotImplementedError(f"prune_visual_tokens: {end - start} visual tokens are no number of tiles")
            if tiles > 1:
                if tile not in arranged:
                    shown = None if pixels is None else pixels[tile : tile + tiles]
                    arranged[tile] = _arrangement(tiles - 1, shown)
                patches += _tiles(*arranged[tile], side, image)
            patches.append(grid_patches(side, side, image))
            tile += tiles
        samples.append(patches)
        if (b + 1) % copies:
            tile = first_of_sample
    return layout_of(samples, max(counts, default=0))


def _tiles(rows: int, columns: int, side: int, image: int) -> list[Patches]:
    return [
        grid_patches(side, side, image, (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows))
        for r in range(rows)
        for c in range(columns)
    ]


def _arrangement(count: int, tiles: Tensor | None) -> tuple[int, int]:
    """Rows and columns of the tiles. The model is not told: put together rightly, they look like the thumbnail.

    Without pixels, as close to a square as can be.
    """
    candidates = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    if tiles is None or len(tiles) != count + 1 or len(candidates) == 1:
        return min(candidates, key=lambda shape: abs(shape[0] - shape[1]))
    small = adaptive_avg_pool2d(tiles.float(), min(24, tiles.shape[-1]))
    differences = []
    for rows, columns in candidates:
        whole = small[:-1].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        differences.append((adaptive_avg_pool2d(whole, small.shape[-1]) - small[-1]).square().mean())
    return candidates[int(torch.stack(differences).argmin())]


class ShuffledClassTokenSaliency(Saliency):
    """The class token's attention in the layer whose features the model takes, averaged over heads and over the
    patches that the pixel shuffle makes one token of."""

    def __init__(self, core: Model) -> None:
        layers: Any = core.vision_tower.encoder.layer
        chosen = core.config.vision_feature_layer
        last = chosen if isinstance(chosen, int) else chosen[-1]
        super().__init__(core.config.vision_config, layers[last if last < 0 else last - 1].attention)
        self._core = core

    def see(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]) -> None:
        with torch.no_grad():
            scores, _, _ = cross_attention_scores(query[:, :, :1], key, scale=scale, query_reduction="last")
        side = round((scores.shape[1] - 1) ** 0.5)
        patches = scores[:, 1:].unflatten(1, (side, side)).unsqueeze(-1)
        shuffled = self._core.pixel_shuffle(patches, scale_factor=self._core.config.downsample_ratio)
        self.seen.append(shuffled.mean(-1).flatten())

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        return by_sample(torch.cat(self.seen), counts)


register_family(
    Family(
        name="InternVL3",
        core=core_of,
        decoder=decoder_of,
        visual_ids=lambda config: (config.image_token_id,),
        layout=layout,
        saliency=ShuffledClassTokenSaliency,
        layers=PAPER_LAYERS,
        watched={"get_image_features": lambda arguments: arguments.get("pixel_values")},
    ),
    "internvl",
)
