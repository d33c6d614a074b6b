"""What a method that merges tokens leaves behind: rows in place of those of the tokens it kept, and what they weigh."""

import torch
from torch import Tensor

from .tokens import Tokens


def with_rows(name: str, hidden: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """The hidden states [B, L, C] with `rows` [B, K, C] of a method in `columns` [B, K]; -1: nowhere."""
    if hidden.dim() != 3:
        raise NotImplementedError(
            f"prune_visual_tokens: {name} merges tokens, and this decoder has {len(hidden)} hidden states of each; "
            "choose an option without merging"
        )
    length = hidden.shape[1]
    at = torch.where(columns >= 0, columns, length)  # a column more takes what has no place
    wider = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
    return wider.scatter(1, at.unsqueeze(-1).expand_as(rows), rows.to(hidden.dtype))[:, :length]


def bias_of(name: str, original: Tokens, after: Tokens, sizes: Tensor | None, before: Tensor | None) -> Tensor | None:
    """[B, V]: log s of every visual token of the prompt that is one of s merged ones, 0 for the others.

    A key that stands for s tokens then weighs as much in a softmax as s of its kind would. sizes [B, K]: of the tokens
    that stay now, by the method of this name. before: what an earlier choice left.
    """
    if sizes is None and before is None:
        raise ValueError(
            f"prune_visual_tokens: calibrate=True needs the sizes of merged tokens in a Selection, and {name} returned "
            "none"
        )
    if sizes is None:
        return before
    if before is not None:
        raise NotImplementedError(f"prune_visual_tokens: calibrate=True, and {name} merges a second time")
    batch, most = original.visual.shape
    at = torch.where(after.origin >= 0, after.origin, most)  # a token more takes what has no place
    ones = sizes.new_ones((batch, most + 1))
    return ones.scatter(1, at, sizes.clamp_min(1))[:, :most].log()
