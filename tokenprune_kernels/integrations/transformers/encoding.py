"""What is written down of one encoding of images, one call of the multimodal model, one call of generate."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .families import Inputs

# An attribute of encoded features: generate encodes before the forward, and hands on nothing but them.
_MARK = "_tokenprune_encoding"


@dataclass(eq=False)
class Encoding:
    """What was seen while images were encoded: by a call of the multimodal model, or by generate before that."""

    arguments: dict[str, Any] = field(default_factory=dict)  # of the family's watched methods, by their names
    saliency: list[Any] = field(default_factory=list)  # of the calls of the probed attention, in order

    def add(self, other: "Encoding") -> None:
        self.arguments.update(other.arguments)
        self.saliency.extend(other.saliency)

    def left_on(self, features: Any) -> None:
        if hasattr(features, "__dict__"):  # no tuple (return_dict=False): nothing that generate hands on
            setattr(features, _MARK, self)

    @staticmethod
    def of(features: Any) -> "Encoding | None":
        found: Encoding | None = getattr(features, _MARK, None)
        return found


@dataclass
class Prompt:
    """What the multimodal model was called with."""

    inputs: Inputs
    is_visual: Tensor  # [B, L] bool


@dataclass
class ModelCall:
    """A call of the multimodal model. prompt: until its decoder is called; None for a step of decoding.

    attention_mask: as the call was given it. What the decoder gets may be made of it, one for each kind of layer.
    """

    prompt: Prompt | None = None
    attention_mask: Any = None
    encoding: Encoding = field(default_factory=Encoding)


@dataclass
class Asked:
    """What generate was asked for, as far as it matters, and what it encoded first.

    unfit: why images cannot be pruned under it, or None. copies: how many rows each sample becomes, one after another.
    prompt [B, L]: the ids of what its next call of the model is given embeddings of.
    """

    unfit: str | None = None
    copies: int = 1
    encoding: Encoding = field(default_factory=Encoding)
    prompt: Tensor | None = None


def check_asked(asked: Asked) -> None:
    if asked.unfit is not None:
        raise NotImplementedError(f"prune_visual_tokens: {asked.unfit}")
