"""The small model of this repository, and the image and the question that the demo asks it by default."""

import re
from pathlib import Path
from typing import Any

import tokenprune_kernels

from . import DemoError, hub

NAME = "tiny-llava-vqa"
CHECKOUT = Path(tokenprune_kernels.__file__).resolve().parent.parent
FOLDER = CHECKOUT / "studies" / "models" / NAME  # which a wheel does not have
IMAGE = "example.png"  # in the model's folder
QUESTION = "what is the yellow digit plus the black digit?"
ANSWER = "14"  # what is true of the image, whatever a model says

# One of each family that the model was trained on (studies/vqa/questions.py).
QUESTIONS = (
    "is there a coin?",
    "how many faces are there?",
    "which digit is on the brick?",
    "what is in the top left corner?",
    "what is below the 5?",
    "which digit is tiny?",
    "what colour is the 9?",
    "which is larger, the red digit or the blue digit?",
    "what is the red digit plus the blue digit?",
)
WORLD = (
    f"{NAME} knows only its small world: images of handwritten digits, coins, faces and three textures (brick, "
    f"grass, gravel), and questions such as {' '.join(QUESTIONS)}"
)


def model_folder(path: str | None) -> Path:
    """Where the checkpoint is: a folder, or an id of the hub; without a path, the small model of this checkout."""
    if path is None:
        if not FOLDER.is_dir():
            raise DemoError(
                f"--model: weights come with a checkout of the repository (studies/models/{NAME}), not with the "
                "installed package: run the demo there, or name a checkpoint on this disk"
            )
        return FOLDER
    folder = Path(path).expanduser()
    if not folder.exists() and (snapshot := hub.cached(path)) is not None:
        return snapshot
    if not folder.is_dir():
        raise DemoError(f"--model: {'not a folder' if folder.exists() else 'no such folder'}: {path}")
    if not (folder / "config.json").is_file():
        raise DemoError(f"--model: not a checkpoint of transformers, it has no config.json: {path}")
    return folder


def is_small(folder: Path) -> bool:
    """Whether the checkpoint is the model of this repository, wherever it lies."""
    return folder.resolve().name == NAME


def image_path(folder: Path) -> Path:
    """The example: beside the small model, or for another one in this checkout."""
    path = (folder if is_small(folder) else FOLDER) / IMAGE
    if not path.is_file():
        raise DemoError(f"--image: the example image is not there ({path}), name an image")
    return path


def unknown_words(tokenizer: Any, question: str) -> list[str]:
    """Words of the question for which the tokenizer has nothing but its unknown token, or nothing at all."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]", question))
    return [word for word in words if not (ids := tokenizer.encode(word, add_special_tokens=False)) or unknown in ids]


def notes(folder: Path, tokenizer: Any, question: str, *, own: bool) -> list[str]:
    """What the user should know before they judge the answers. own: the image or the question is theirs."""
    words = unknown_words(tokenizer, question)
    lines = []
    if is_small(folder) and (own or words):
        lines.append(WORLD)
    if words:
        lines.append(f"words that the model does not know: {', '.join(words)}")
    return lines
