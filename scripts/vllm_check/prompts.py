"""What is asked: questions of unequal length about pictures of unequal size, some about two or none of them."""

from dataclasses import dataclass
from typing import Any

from testing import ROOT

QUESTIONS = ("is there a 5?", "which digit is tiny?", "what colour is the 4?", "which is larger, the red or the blue?")


@dataclass(frozen=True)
class Prompt:
    question: str
    images: tuple[Any, ...]  # PIL

    def text(self, family: str) -> str:
        image = "<|vision_start|><|image_pad|><|vision_end|>" if family.startswith("Qwen") else "<image>"
        return image * len(self.images) + " " + self.question

    def request(self, family: str) -> dict[str, Any]:
        """As the engine takes it."""
        images = {"multi_modal_data": {"image": list(self.images)}} if self.images else {}
        return {"prompt": self.text(family), **images}


def picture() -> Any:
    from PIL import Image

    return Image.open(ROOT / "studies" / "models" / "tiny-llava-vqa" / "example.png").convert("RGB")


def pictures(count: int) -> list[Any]:
    """So many different ones of the example's size: it, shifted."""
    from PIL import ImageChops

    return [ImageChops.offset(picture(), 7 * n, 3 * n) for n in range(count)]


def prompts() -> list[Prompt]:
    whole = picture()
    wide, high = whole.crop((0, 0, 336, 160)), whole.crop((60, 0, 200, 336))
    single = [Prompt(q, (image,)) for q, image in zip(QUESTIONS, (whole, wide, high, whole), strict=True)]
    return [*single, Prompt(QUESTIONS[2], (whole, high)), Prompt(QUESTIONS[1], ())]
