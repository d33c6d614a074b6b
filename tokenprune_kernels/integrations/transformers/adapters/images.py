"""Which images of the vision tower are in which sample, in the order of the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..families import Inputs, Model
from ..layout import Layout, Patches, grid_patches, layout_of


def encoded_with(inputs: Inputs, *methods: str) -> list[Any]:
    """What is remembered of each of these methods of the core (`Family.watched`), of which one was called at least."""
    seen = [inputs.get(method) for method in methods]
    if all(value is None for value in seen):
        raise NotImplementedError("prune_visual_tokens: encode the images inside the block, their sizes are needed")
    return seen


def sizes_seen(arguments: dict[str, Any]) -> Any:
    """Height and width of each image, in pixels. Pixtral's images are padded to the largest of a batch."""
    sizes = arguments.get("image_sizes")
    pixels = arguments.get("pixel_values")
    if sizes is None and pixels is not None:
        return [tuple(pixels.shape[-2:])] * len(pixels)
    return sizes


def grids_of(core: Model, inputs: Inputs) -> list[tuple[int, int]]:
    """Height and width of each image, in patches."""
    (sizes,) = encoded_with(inputs, "get_image_features")
    if hasattr(sizes, "tolist"):
        sizes = sizes.tolist()
    patch = core.config.vision_config.patch_size
    return [(height // patch, width // patch) for height, width in sizes]


def prompt_order(
    lengths: dict[int, list[int]], inputs: Inputs, counts: list[int]
) -> tuple[list[list[tuple[int, int]]], int]:
    """For each sample its images and videos, as (visual id, number among those of this id), and its number of copies.

    lengths: the visual tokens of each image or video, in the order of the vision tower, by the id that stands for them.
    generate may repeat each sample for its beams after the tower has run: then one entry stands for all its copies.
    """
    total, shown = sum(counts), sum(map(sum, lengths.values()))
    copies = total // shown if shown else 0
    once = counts[:: max(copies, 1)]
    if copies * shown != total or [c for c in once for _ in range(copies)] != counts:
        raise ValueError(
            f"prune_visual_tokens: {total} visual tokens in the prompt, but the vision tower was given images for "
            f"{shown}; encode the images inside the block"
        )
    ids: list[list[int]] = []
    if len(lengths) > 1:
        rows: Tensor = inputs["input_ids"][::copies].cpu()
        kinds = torch.tensor(list(lengths))
        ids = [row[torch.isin(row, kinds)].tolist() for row in rows]
    left = {kind: list(enumerate(each)) for kind, each in lengths.items()}
    samples = []
    for b, count in enumerate(once):
        sample: list[tuple[int, int]] = []
        start = 0
        while start < count:
            kind = ids[b][start] if ids else next(iter(lengths))
            number, length = left[kind].pop(0)
            sample.append((kind, number))
            start += length
        samples.append(sample)
    return samples, copies


def layout_of_images(images: dict[int, list[list[Patches]]], inputs: Inputs, counts: list[int]) -> Layout:
    """images: the parts of each image or video, one stretch of the prompt; parts number their images from 0."""
    lengths = {kind: [sum(len(part.positions) for part in parts) for parts in each] for kind, each in images.items()}
    order, copies = prompt_order(lengths, inputs, counts)
    samples = []
    for sample in order:
        patches: list[Patches] = []
        first = 0
        for kind, number in sample:
            parts = images[kind][number]
            patches += [replace(part, image=first + part.image) for part in parts]
            first += 1 + max(part.image for part in parts)
        samples += [patches] * copies
    return layout_of(samples, max(counts, default=0))


def grid_layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    """A grid of patches per image."""
    images = [[grid_patches(height, width, 0)] for height, width in grids_of(core, inputs)]
    return layout_of_images({core.config.image_token_id: images}, inputs, counts)


def equal_grids(counts: list[int], height: int, width: int) -> Layout:
    """Images of height x width tokens each, as many as a sample has; tiles of an image are images of their own."""
    each = height * width
    if any(count % each for count in counts):
        raise ValueError(
            f"prune_visual_tokens: {', '.join(map(str, counts))} visual tokens in the samples are not images of {each}"
        )
    samples = [[grid_patches(height, width, image) for image in range(count // each)] for count in counts]
    return layout_of(samples, max(counts, default=0))


def values_of_images(values: Mapping[int, Sequence[Tensor]], inputs: Inputs, counts: list[int]) -> Tensor:
    """[B, V] float32 from a vector of one value per token for each image or video, 0 in the padding."""
    order, copies = prompt_order({kind: [len(v) for v in each] for kind, each in values.items()}, inputs, counts)
    most = max(counts, default=0)
    rows = []
    for sample in order:
        row = torch.cat([values[kind][number] for kind, number in sample] or [torch.zeros(0)]).float()
        rows += [torch.nn.functional.pad(row, (0, most - len(row)))] * copies
    return torch.stack([row.to(rows[0].device) for row in rows])


def values_of_run(core: Model, inputs: Inputs, counts: list[int], seen: list[Any]) -> Tensor:
    """Of the last run of a tower over all images of a prompt: [images, tokens]."""
    return values_of_images({core.config.image_token_id: list(seen[-1])}, inputs, counts)


def beam_copies(shown: int, counts: list[int]) -> int:
    """How many samples in a row share what the vision tower showed once.

    Beam search repeats each sample, and newer versions of generate do so after the vision tower has run.
    """
    for copies in range(1, len(counts) + 1):
        once = counts[::copies]
        if sum(once) <= shown and [count for count in once for _ in range(copies)] == counts:
            return copies
    raise RuntimeError(f"prune_visual_tokens: {sum(counts)} visual tokens, but the vision tower showed {shown}")


def by_sample(values: Tensor, counts: list[int]) -> Tensor:
    """[B, V] from one vector over the visual tokens of the batch, one sample after the other; 0 in the padding.

    One stretch serves all copies of a sample (`beam_copies`). Values of earlier runs of the tower, whose prompts never
    came, are in front.
    """
    copies = beam_copies(len(values), counts)
    counts = counts[::copies]
    stretches = values[len(values) - sum(counts) :].float().split(counts)
    padded = [torch.nn.functional.pad(s, (0, max(counts) - len(s))) for s in stretches]
    return torch.stack(padded).repeat_interleave(copies, 0)
