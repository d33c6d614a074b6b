"""Which pictures of the vision tower are in which sample, in the order of the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..families import Inputs, Layout, Patches, layout_of


@dataclass
class Picture:
    """A picture or video as the prompt has it: one stretch of visual tokens. Its parts number their images from 0."""

    parts: list[Patches]

    @property
    def tokens(self) -> int:
        return sum(len(part.positions) for part in self.parts)


def encoded_with(inputs: Inputs, *methods: str) -> list[Any]:
    """What is remembered of each of these methods of the core (`Family.watched`): that of one was called at least."""
    seen = [inputs.get(method) for method in methods]
    if all(value is None for value in seen):
        raise NotImplementedError("prune_visual_tokens: encode the pictures inside the block, their sizes are needed")
    return seen


def prompt_order(
    lengths: dict[int, list[int]], inputs: Inputs, counts: list[int]
) -> tuple[list[list[tuple[int, int]]], int]:
    """For each sample its pictures, as (visual id, number among those of this id), and how often a sample is repeated.

    lengths: the visual tokens of each picture, in the order of the vision tower, by the id that stands for them.
    generate may repeat each sample for its beams after the tower has run: then one entry stands for all its copies.
    """
    total, shown = sum(counts), sum(map(sum, lengths.values()))
    copies = total // shown if shown else 0
    once = counts[:: max(copies, 1)]
    if copies * shown != total or [c for c in once for _ in range(copies)] != counts:
        raise ValueError(
            f"prune_visual_tokens: {total} visual tokens in the prompt, but the vision tower was given pictures for "
            f"{shown}; encode the pictures inside the block"
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


def layout_of_pictures(pictures: dict[int, list[Picture]], inputs: Inputs, counts: list[int]) -> Layout:
    lengths = {kind: [picture.tokens for picture in each] for kind, each in pictures.items()}
    order, copies = prompt_order(lengths, inputs, counts)
    samples = []
    for sample in order:
        patches: list[Patches] = []
        images = 0
        for kind, number in sample:
            parts = pictures[kind][number].parts
            patches += [replace(part, image=images + part.image) for part in parts]
            images += 1 + max(part.image for part in parts)
        samples += [patches] * copies
    return layout_of(samples, max(counts, default=0))


def values_of_pictures(values: Mapping[int, Sequence[Tensor]], inputs: Inputs, counts: list[int]) -> Tensor:
    """[B, V] float32 from a vector of one value per token for each picture, 0 in the padding."""
    order, copies = prompt_order({kind: [len(v) for v in each] for kind, each in values.items()}, inputs, counts)
    most = max(counts, default=0)
    rows = []
    for sample in order:
        row = torch.cat([values[kind][number] for kind, number in sample] or [torch.zeros(0)]).float()
        rows += [torch.nn.functional.pad(row, (0, most - len(row)))] * copies
    return torch.stack([row.to(rows[0].device) for row in rows])
