"""What the LLaVAs of the engine share: a tower and a projector, which one method runs on the images of a batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ..transformers.adapters.towers import check_grid
from ..transformers.layout import Patches
from .checks import check_method
from .images import Seen, chooser_of, prune_images, tower_attention, tower_scores, watched


def check_classes(model: type, processor: type) -> None:
    """Raises unless both have the methods that this package overrides."""
    check_method(model, "_process_image_input", "image_input")
    check_method(processor, "_get_mm_hashes", "inputs")
    check_method(processor, "_get_prompt_updates", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs")


class PrunedLlava:
    """Comes in front of one of the engine's models."""

    supports_tower_connector_lora = False  # for which the engine counts the tower's tokens by the placeholders
    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        choose = chooser_of(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.choose = choose
        check_grid(self)
        if choose.reads_saliency:
            tower_attention(self)  # or an error, before the first request

    def layouts(self, image_input: Any) -> Sequence[Sequence[Patches]]:
        """Where the tokens of each image lie."""
        raise NotImplementedError

    def saliencies(self, image_input: Any, scores: Tensor) -> Sequence[Tensor]:
        """[V] of each image, from the scores [crops, patches] of all of them."""
        raise NotImplementedError

    def _process_image_input(self, image_input: Any) -> Any:
        seen: Seen = []
        with watched(tower_attention(self), seen) if self.choose.reads_saliency else nullcontext():
            features = super()._process_image_input(image_input)  # type: ignore[misc]
        kept = prune_images(
            self.choose,
            features,
            lambda: self.layouts(image_input),
            lambda: self.saliencies(image_input, tower_scores(self, seen)),
        )
        return [rows for _, rows in kept]
