"""The arguments of a module's forward, under the names that this version of transformers gives them."""

import inspect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .families import Inputs

# What the cache is called: from transformers 5.24 on, where the second name is still taken from callers, and before.
CACHE_NAMES = ("cache", "past_key_values")


def all_rows(inputs: Inputs) -> tuple[int, Inputs]:
    """Of a decoder that takes logits_to_keep and goes on with so many rows somewhere: that number, and its arguments
    without it. Which rows are the last is another matter when tokens are gone: they are taken in front of its norm."""
    rows = inputs.get("logits_to_keep")
    return (rows, {**inputs, "logits_to_keep": 0}) if isinstance(rows, int) and rows else (0, inputs)


@dataclass(frozen=True)
class Arguments:
    """What a module's forward takes; `arguments_of` makes it."""

    module: str
    names: tuple[str, ...]  # in order

    def bind(self, args: Sequence[Any], kwargs: Inputs) -> Inputs:
        """Returns all arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def split(self, inputs: Inputs, positional: int) -> tuple[tuple[Any, ...], Inputs]:
        """The inverse of `bind`: hooks of others find the first arguments where the caller put them."""
        first = self.names[:positional]
        return tuple(inputs[name] for name in first), {n: value for n, value in inputs.items() if n not in first}

    def cache(self, inputs: Inputs) -> Any:
        """The cache, or None when the caller gave None or, where forward has a default, nothing."""
        for name in CACHE_NAMES if CACHE_NAMES[0] in self.names else CACHE_NAMES[1:]:
            if name in inputs:
                return inputs[name]
        return None

    def given(self, inputs: Inputs, *needed: str) -> None:
        """Raises for a call that lacks one of the needed arguments; "cache" stands for all of its names."""
        lacking = _lacking(inputs, needed)
        if lacking:
            raise RuntimeError(
                f"prune_visual_tokens: {self.module} was called without {lacking}; it got {', '.join(sorted(inputs))}"
            )


def _lacking(names: Collection[str], needed: Iterable[str]) -> str | None:
    """What is needed and there under none of its names; the first of several."""
    for name in needed:
        spellings = CACHE_NAMES if name == "cache" else (name,)
        if not any(spelling in names for spelling in spellings):
            return " or ".join(spellings)
    return None


def arguments_of(module: nn.Module, *needed: str) -> Arguments:
    """Raises when forward lacks one of the needed arguments; "cache" stands for all of its names."""
    names = tuple(name for name in inspect.signature(module.forward).parameters if name != "self")
    lacking = _lacking(names, needed)
    if lacking:
        raise NotImplementedError(
            f"prune_visual_tokens: the forward of {type(module).__name__} takes no {lacking}, only {', '.join(names)}; "
            "this version of transformers is not supported"
        )
    return Arguments(type(module).__name__, names)
