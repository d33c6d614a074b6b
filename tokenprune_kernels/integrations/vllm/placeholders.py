"""The front end: an image gets as many placeholders in the prompt as tokens are kept of it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..transformers.budgets import Budget, budget_of
from .setting import current


class FewerPlaceholders:
    """Comes in front of one of the engine's multimodal processors."""

    def _get_prompt_updates(
        self, mm_items: Mapping[str, Any], hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        images = mm_items.get("image")
        if images is not None and images.get_passthrough_data():
            raise ValueError(
                "tokenprune_kernels: a request must bring images, got image_embeds, which may have been pruned already"
            )
        keep = current().keep
        assert keep is not None
        return [
            replace(update, replacement=shortened(update.replacement, budget_of(keep)))
            if update.modality == "image"
            else update
            for update in updates
        ]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """What is cached of an image, whether encoded or as keys and values, belongs to a setting."""
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {
            modality: [marked(each) for each in of_items] if modality == "image" else of_items
            for modality, of_items in hashes.items()
        }


def marked(identity: str) -> str:
    return hashlib.sha256(f"{identity} {current().identity}".encode()).hexdigest()


def shortened(replacement: Any, budget: Budget) -> Callable[[int], list[int]]:
    """What stands for an image in the prompt, a token over and over again, as often as tokens are kept."""

    def kept(index: int) -> list[int]:
        tokens = replacement(index) if callable(replacement) else replacement
        if not isinstance(tokens, list) or len(set(tokens)) != 1:
            raise NotImplementedError(
                f"tokenprune_kernels: an image must stand as one repeated token in the prompt, got {tokens!r}"
            )
        (number,) = budget([len(tokens)])
        return tokens[:number]

    return kept
