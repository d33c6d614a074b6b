"""The tokens in front of a decoder layer, and what is left of them after a selection."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import gather_compact, indices_to_mask, mask_to_indices


@dataclass(frozen=True)
class Tokens:
    """A batch of prompts of one padded length.

    slot [B, L]: which visual token of its sample a column is, counted from 0, or -1: text and padding.
    visual [B, V]: the column of each visual token, -1 after the last. counts: visual tokens per sample, on the host.
    real [B, L] bool: False for padding; None when there is none. lengths: real tokens per sample, on the host.
    origin [B, V]: the index of each visual token among those of the unpruned prompt, -1 after the last.
    suffix: columns from the first text behind the last visual token on, or from the last real column if there is none;
        of the sample that has most of them.
    """

    slot: Tensor
    visual: Tensor
    counts: list[int]
    real: Tensor | None
    lengths: list[int]
    origin: Tensor
    suffix: int

    @property
    def length(self) -> int:
        return self.slot.shape[1]

    def numbered(self) -> Tensor:
        """[B, L]: the number of each column among the real ones."""
        if self.real is None:
            return torch.arange(self.length, device=self.slot.device).expand(len(self.counts), -1)
        return (self.real.cumsum(1) - 1).clamp_min(0)

    def prompt_slot(self) -> Tensor:
        """[B, L]: which visual token of the unpruned prompt a column is, or -1: text and padding."""
        return indices_at(self.origin, self.slot)

    def visual_mask(self) -> Tensor | None:
        """[B, V] bool, False for the padding of shorter samples; None when there is none.

        Some samples of a batch may all be shorter than V.
        """
        return self.visual >= 0 if min(self.counts) < self.visual.shape[1] else None


def indices_at(indices: Tensor, at: Tensor) -> Tensor:
    """[B, K] of `indices` [B, N] those at `at` [B, K]; -1, no index, at -1."""
    # gather_compact gives 0 there: counted from 1, 0 is none.
    return gather_compact([indices + 1], at, dims=[1])[0] - 1


def joined(parts: Sequence[tuple[Tensor | None, int]], batch: int, device: torch.device) -> Tensor | None:
    """[B, N] bool: which columns are real, of parts that follow each other: each its flags [B, n] or None, all of its n
    columns. None when all are."""
    if all(real is None for real, _ in parts):
        return None
    ones = (torch.ones((batch, n), dtype=torch.bool, device=device) if real is None else real for real, n in parts)
    return torch.cat([real.to(device) for real in ones], 1)


def read_prompt(is_visual: Tensor, real: Tensor | None) -> Tokens:
    """The tokens of a prompt, from which columns are visual and which are real, both [B, L] bool. Waits for the device
    once."""
    length = is_visual.shape[1]
    if real is not None:
        is_visual = is_visual & real
    column = torch.arange(1, length + 1, device=is_visual.device)
    ends = torch.where(is_visual, column, 0).amax(1)
    stops, lengths = torch.full_like(ends, length), torch.full_like(ends, length)
    if real is not None:
        stops, lengths = torch.where(real, column, 0).amax(1), real.sum(1)
    ends = torch.minimum(ends, stops - 1)
    counts, lengths, ends = torch.stack([is_visual.sum(1), lengths, ends]).tolist()
    if min(lengths) == length:
        real = None
    visual, _ = mask_to_indices(is_visual, max(counts, default=0))
    slot = torch.where(is_visual, is_visual.cumsum(1) - 1, -1)
    origin = torch.where(visual >= 0, torch.arange(visual.shape[1], device=visual.device), -1)
    return Tokens(slot, visual, counts, real, lengths, origin, max(length - end for end in ends))


def keep(tokens: Tokens, selected: Tensor, kept_counts: list[int]) -> tuple[Tokens, Tensor]:
    """The tokens after a selection, and the columns they come from: [B, L'], -1 in the padding, which is on the left.

    selected [B, K]: indices among the visual tokens, ascending, -1 after the last. Every other real token stays.
    Generation reads the last column: samples that keep fewer tokens are padded on the left.
    """
    chosen = indices_to_mask(selected, tokens.visual.shape[1])
    stays = (tokens.slot < 0) | chosen.gather(1, tokens.slot.clamp_min(0))
    if tokens.real is not None:
        stays = stays & tokens.real
    lengths = [n - c + k for n, c, k in zip(tokens.lengths, tokens.counts, kept_counts, strict=True)]
    longest = max(lengths)
    columns, found = mask_to_indices(stays, longest)
    real = None
    if min(lengths) < longest:
        index = torch.arange(longest, device=columns.device) - (longest - found).unsqueeze(1)
        real = index >= 0
        columns = torch.where(real, columns.gather(1, index.clamp_min(0)), -1)
    is_visual = indices_at(tokens.slot, columns) >= 0
    visual, _ = mask_to_indices(is_visual, max(kept_counts))
    slot = torch.where(is_visual, is_visual.cumsum(1) - 1, -1)
    origin = indices_at(tokens.origin, selected[:, : max(kept_counts)])
    after = Tokens(slot, visual, list(kept_counts), real, lengths, origin, min(tokens.suffix, longest))
    return after, columns
