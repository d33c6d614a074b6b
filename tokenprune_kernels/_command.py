"""What the commands of `python -m tokenprune_kernels` share."""

import os
from pathlib import Path

import torch

DEVICES = ("auto", "cpu", "cuda")


class CommandError(ValueError):
    """What the user asked for cannot be done; the message is the one line they see."""


def device_of(name: str) -> torch.device:
    """The device that `--device` names; auto: a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device: this PyTorch finds no CUDA device")
    return torch.device(name)


def file_to_write(option: str, text: str, ending: str) -> Path:
    """The path of a file that can be written."""
    path = Path(text).expanduser()
    folder = path.resolve().parent
    if path.suffix.lower() != ending:
        raise CommandError(f"{option}: give a name that ends in {ending}, got {path}")
    if not folder.is_dir():
        raise CommandError(f"{option}: no such folder: {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"{option}: cannot write {path}")
    return path
