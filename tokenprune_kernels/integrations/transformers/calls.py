"""What a block knows of the calls that are running: of each thread its own, the innermost last.

Nothing here outlives a call of the model or an encoding of pictures. What is needed longer stays on what the call
returns: on the cache for decoding (cache.py), on the features for their prefill (`Pictures.left_on`).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .families import Inputs

if TYPE_CHECKING:
    from .decode import Decode
    from .prefill import Prefill

# An attribute of encoded features: generate encodes before the forward, and hands on nothing but them.
_MARK = "_tokenprune_pictures"


@dataclass
class Pictures:
    """What was seen while pictures were encoded: by a call of the multimodal model, or by generate before that."""

    arguments: dict[str, Any] = field(default_factory=dict)  # of the family's watched methods, by their names
    saliency: list[Any] = field(default_factory=list)  # of the calls of the probed attention, in order

    def add(self, other: "Pictures") -> None:
        self.arguments.update(other.arguments)
        self.saliency.extend(other.saliency)

    def left_on(self, features: Any) -> None:
        if hasattr(features, "__dict__"):  # no tuple (return_dict=False): nothing that generate hands on
            setattr(features, _MARK, self)

    @staticmethod
    def of(features: Any) -> "Pictures | None":
        found: Pictures | None = getattr(features, _MARK, None)
        return found


@dataclass
class Prompt:
    """What the multimodal model was called with."""

    inputs: Inputs
    is_visual: Tensor  # [B, L] bool


@dataclass
class ModelCall:
    """A call of the multimodal model. prompt: until its decoder is called; None for a step of decoding."""

    prompt: Prompt | None
    pictures: Pictures = field(default_factory=Pictures)


@dataclass(frozen=True)
class Asked:
    """What generate was asked for, as far as it matters, and what it encoded first. chunk: prefill_chunk_size."""

    assisted: bool
    chunk: int | None
    pictures: Pictures = field(default_factory=Pictures)


class Calls(threading.local):
    def __init__(self) -> None:
        self.models: list[ModelCall] = []
        self.decoders: list[Prefill | Decode | None] = []
        self.encodings: list[Pictures] = []  # running ones outside or inside of a call of the model
        self.asked: list[Asked] = []

    @property
    def pictures(self) -> Pictures | None:
        """Where to write down what is seen of pictures now; None when nobody in this thread asked for it."""
        if self.encodings:
            return self.encodings[-1]
        return self.models[-1].pictures if self.models else None

    @property
    def decoder(self) -> "Prefill | Decode | None":
        return self.decoders[-1] if self.decoders else None

    @contextmanager
    def encoding(self) -> Iterator[Pictures]:
        """Writes down what one encoding shows, and adds it to the encoding or the call of the model around it, or else
        to the generate around it."""
        around, here = self.pictures, Pictures()
        self.encodings.append(here)
        try:
            yield here
        finally:
            self.encodings.pop()
        if around is None and self.asked:
            around = self.asked[-1].pictures
        if around is not None:
            around.add(here)

    def encoded_as(self, features: list[Any]) -> list[Pictures]:
        """What was seen of these features, which the model is called with.

        accelerate's hooks make others of what a module is called with. In generate, they are what it has encoded.
        """
        found = [pictures for pictures in map(Pictures.of, features) if pictures is not None]
        if len(found) < len(features) and self.asked:
            return [self.asked[-1].pictures]
        return found

    @contextmanager
    def generating(self, asked: Asked) -> Iterator[None]:
        self.asked.append(asked)
        try:
            yield
        finally:
            self.asked.pop()
