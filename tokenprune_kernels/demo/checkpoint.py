"""A checkpoint of transformers on disk: loading it without its chatter, and the prompt of an image and a question."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from ..integrations.transformers.registry import family_of, family_of_type
from . import DemoError


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings and progress bars of transformers stay away: stderr is the demo's."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def one_line(error: Exception) -> str:
    """The beginning of what transformers says in paragraphs."""
    return textwrap.shorten(str(error) or type(error).__name__, 800, placeholder=" ...")


@dataclass(frozen=True)
class Checkpoint:
    """A model and the processor of its prompts."""

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def visual_ids(self) -> torch.Tensor:
        """The ids that stand for visual tokens."""
        family = family_of(self.model)
        return torch.tensor(family.visual_ids(family.core(self.model).config), device=self.model.device)

    def seen(self, image: Image.Image) -> Image.Image:
        """The part of the image that the model looks at: LLaVA-1.5's processor cuts off what is not square."""
        images = self.processor.image_processor
        size = getattr(images, "size", None) or {}
        if self.model.config.model_type != "llava" or not getattr(images, "do_center_crop", False):
            return image
        crop = (images.crop_size["width"], images.crop_size["height"])
        if "shortest_edge" in size:
            scale = (size["shortest_edge"] / min(image.size),) * 2
        else:
            scale = (size["width"] / image.width, size["height"] / image.height)
        width, height = (
            min(max(1, round(c / s)), length) for c, s, length in zip(crop, scale, image.size, strict=True)
        )
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def prompt(self, image: Image.Image, question: str) -> Any:
        """What the model is called with."""
        ids = torch.tensor(self.tokenizer.encode(question, add_special_tokens=False), device=self.model.device)
        if torch.isin(ids, self.visual_ids()).any():
            raise DemoError("--question: the question must not contain the image placeholder")
        turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
        try:
            inputs = self.processor.apply_chat_template(
                [turn], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
        except Exception as error:  # of templates and image processors that come with the checkpoint
            raise DemoError(f"--model: its processor refuses the image or the question: {one_line(error)}") from None
        return inputs.to(self.model.device, dtype=self.model.dtype)


def _processor(folder: Path) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # files of other people fail in as many ways as transformers has readers
        # What transformers then says may be about something else.
        missing = "" if find_spec("torchvision") else "; torchvision is not installed, and families with video need it"
        raise DemoError(f"--model: cannot load the processor of {folder}{missing}: {one_line(error)}") from None
    if not getattr(processor, "chat_template", None):
        raise DemoError(f"--model: no chat template in {folder}, and the demo asks through the checkpoint's own")
    return processor


def load(folder: Path, device: torch.device) -> Checkpoint:
    """Model and processor; float32 on a CPU, else in the checkpoint's own type."""
    dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        # Before the weights are read, and before transformers lists every model it has.
        family_of_type(config.model_type, (config.architectures or [type(config).__name__])[0])
        processor = _processor(folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except DemoError:
        raise
    except NotImplementedError as error:  # the family
        raise DemoError(f"--model: {one_line(error)}") from None
    except Exception as error:  # as above
        raise DemoError(f"--model: cannot load {folder}: {one_line(error)}") from None
    return Checkpoint(model.to(device).eval(), processor)
