"""What a block knows of the calls that are running: of each thread its own, the innermost last.

Nothing here outlives a call of the model or an encoding of images. What is needed longer stays on what the call
returns: on the cache for decoding (cache.py), on the features for their prefill (`Encoding.left_on`).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .decode import Decode
from .encoding import Asked, Encoding, ModelCall
from .prefill import Prefill
from .training import HeadCall


class Calls(threading.local):
    def __init__(self) -> None:
        self.heads: list[HeadCall] = []
        self.models: list[ModelCall] = []
        self.decoders: list[Prefill | Decode | None] = []
        self.encodings: list[Encoding] = []  # of calls of the model, and of encodings outside or inside of one
        self.asked: list[Asked] = []

    @property
    def encoding(self) -> Encoding | None:
        """Where to write down what is seen of images now; None when no block of this thread asks for it."""
        return self.encodings[-1] if self.encodings else None

    @property
    def encoding_inside(self) -> bool:
        """Whether images are being encoded now, by a method of the model that was called for itself or by a forward."""
        return bool(self.encodings) and all(call.encoding is not self.encodings[-1] for call in self.models)

    @property
    def decoder(self) -> Prefill | Decode | None:
        return self.decoders[-1] if self.decoders else None

    def begin_model(self) -> ModelCall:
        call = ModelCall()
        self.models.append(call)
        self.encodings.append(call.encoding)
        return call

    def end_model(self) -> ModelCall | None:
        """The call that ended; None if it was never begun, since another hook raised in front of ours."""
        if not self.models:
            return None
        call = self.models.pop()
        self.encodings.remove(call.encoding)
        return call

    @contextmanager
    def encode(self) -> Iterator[Encoding]:
        """Writes down what one encoding shows, and adds it to the encoding or the call of the model around it, or else
        to the generate around it."""
        around, here = self.encoding, Encoding()
        self.encodings.append(here)
        try:
            yield here
        finally:
            self.encodings.remove(here)
        if around is None and self.asked:
            around = self.asked[-1].encoding
        if around is not None:
            around.add(here)

    def encoded_as(self, features: list[Any]) -> list[Encoding]:
        """What was seen of these features, which the model is called with.

        accelerate's hooks make others of what a module is called with. In generate, they are what it has encoded.
        """
        found = [encoding for encoding in map(Encoding.of, features) if encoding is not None]
        if len(found) < len(features) and self.asked:
            return [self.asked[-1].encoding]
        return found

    @contextmanager
    def generating(self, asked: Asked) -> Iterator[None]:
        self.asked.append(asked)
        try:
            yield
        finally:
            self.asked.pop()
