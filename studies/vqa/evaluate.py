"""Single questions of a split, and the model's answers to them: the accuracy per family.

`python -m studies.vqa.evaluate studies/models/tiny-llava-vqa --split validation` prints it; with
`--method coast --keep 128` that of the pruned model.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens

from .batches import in_cells, labels, normalised
from .model import SIDE
from .questions import FAMILIES, Question, ask, chance
from .scene import KINDS, Scene, scene
from .words import BOS, IMAGE, encode


class Item(NamedTuple):
    """A question about an image of its own."""

    seed: int
    question: Question


class Batch(NamedTuple):
    """Questions of one length, ready for the model; `indices` say which of the items they are."""

    inputs: dict[str, Tensor]
    answers: Tensor  # [B]
    indices: list[int]
    images: list[Scene]


def items(split: str, per_family: int) -> list[Item]:
    """So many questions of every family, each about another image; more of them begin with the same ones."""
    found: dict[str, list[Item]] = {name: [] for name in FAMILIES}
    missing = len(found)
    for seed, family in enumerate(itertools.cycle(found)):
        if not missing:
            break
        if len(found[family]) == per_family:
            continue
        drawn = scene(split, seed)
        # Scenes without such a question are passed over.
        if next(FAMILIES[family](drawn), None) is not None:
            found[family].append(Item(seed, ask(drawn, np.random.default_rng((seed, 1)), 1, (family,))[0]))
            missing -= len(found[family]) == per_family
    return [item for name in found for item in found[name]]


def prompt(text: str) -> list[int]:
    """The tokens of an image and a question, as the processor makes them."""
    return [BOS, *[IMAGE] * (SIDE * SIDE), *encode(text)]


def needed(image: Scene, question: Question) -> Tensor:
    """[576] bool: the visual tokens on the objects that the answer depends on; none where something is absent."""
    shown, *_ = labels(image)
    return torch.from_numpy((shown < len(KINDS)) & in_cells(question.cells, SIDE))


def batches(split: str, asked: list[Item], size: int) -> Iterator[Batch]:
    """Questions of equal length together: no padding, no masks."""

    def length(index: int) -> int:
        return len(encode(asked[index].question.text))

    for _, group in itertools.groupby(sorted(range(len(asked)), key=length), key=length):
        same = list(group)
        for start in range(0, len(same), size):
            indices = same[start : start + size]
            images = [scene(split, asked[n].seed) for n in indices]
            tokens = torch.tensor([prompt(asked[n].question.text) for n in indices])
            answers = torch.tensor([encode(asked[n].question.answer)[0] for n in indices])
            inputs = {
                "input_ids": tokens, "attention_mask": torch.ones_like(tokens),
                "pixel_values": normalised(torch.from_numpy(np.stack([p.pixels for p in images]))),
            }  # fmt: skip
            yield Batch(inputs, answers, indices, images)


@torch.inference_mode()
def answered(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[B]: the first word of each answer, by greedy decoding; every answer of the task is one word."""
    words: Tensor = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
    return words


def load(folder: Path) -> Any:
    """The model of a folder, for inference in float32."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def by_family(asked: list[Item], right: Tensor) -> dict[str, float]:
    """Accuracy of each family."""
    families = np.array([item.question.family for item in asked])
    return {name: float(right.numpy()[families == name].mean()) for name in FAMILIES}


def accuracy(model: Any, split: str, per_family: int, size: int = 32) -> tuple[list[Item], Tensor]:
    """The items, and which of them the unpruned model answers correctly."""
    asked = items(split, per_family)
    right = torch.zeros(len(asked), dtype=torch.bool)
    for batch in batches(split, asked, size):
        right[batch.indices] = answered(model, batch.inputs) == batch.answers
    return asked, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--per-family", type=int, default=100)
    parser.add_argument("--method", choices=METHODS, help="prune by this method (default: keep all tokens)")
    parser.add_argument("--keep", type=int, default=128, help="tokens that it keeps of 576 (default: 128)")
    parser.add_argument("--positions", choices=("original", "renumber"), help="of what is kept (default: the method's)")
    options = parser.parse_args()
    model, block = load(options.model), nullcontext()
    if options.method:
        block = prune_visual_tokens(model, options.method, options.keep, positions=options.positions)
    with block:
        asked, right = accuracy(model, options.split, options.per_family)
    guess = chance([item.question for item in asked])
    for name, share in by_family(asked, right).items():
        print(f"{name:10} {share:6.1%}   (words of the question alone: {guess[name]:.1%})")
    print(f"{'all':10} {right.double().mean().item():6.1%} of {len(asked)} questions, split {options.split}")


if __name__ == "__main__":
    main()
