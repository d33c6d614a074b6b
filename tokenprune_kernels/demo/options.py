"""What the options of the command mean, and which values are refused."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from .._command import device_of, file_to_write
from ..integrations.transformers.budgets import budget_of
from ..methods import method_names
from . import DemoError


class Options(NamedTuple):
    """What can be checked before a model is loaded."""

    keep: int | float
    methods: list[str]
    out: Path
    seed: int
    repeats: int
    max_new_tokens: int
    device: torch.device


def parse_keep(text: str) -> int | float:
    """`128` is a count; `0.22`, with a dot, a share of the visual tokens."""
    try:
        keep = float(text) if "." in text else int(text)
    except ValueError:
        raise DemoError(f"--keep: expected a count such as 128 or a ratio such as 0.22, got {text!r}") from None
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise DemoError(f"--keep: a ratio must be above 0 and at most 1.0, got {text}")
    if keep < 1 and isinstance(keep, int):
        raise DemoError(f"--keep: must keep at least 1 token, got {text}")
    return keep


def kept_of(keep: int | float, visual: int) -> int:
    """How many of this prompt's visual tokens stay."""
    if isinstance(keep, int) and keep > visual:
        raise DemoError(f"--keep: must keep at most all {visual} visual tokens, got {keep}")
    (kept,) = budget_of(keep)([visual])
    return kept


def parse_methods(text: str) -> list[str]:
    """`all`, or names joined by commas."""
    known = method_names()
    names = list(known) if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise DemoError(f"--method: unknown method {name!r}, choose from all, {', '.join(known)}")
    return names


def check(options: argparse.Namespace) -> Options:
    for name in ("repeats", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise DemoError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.seed < 2**63:
        raise DemoError(f"--seed: must be at least 0 and below 2**63, got {options.seed}")
    if options.question is not None and not options.question.strip():
        raise DemoError("--question: it is empty")
    return Options(
        parse_keep(options.keep), parse_methods(options.method), file_to_write("--out", options.out, ".png"),
        options.seed, options.repeats, options.max_new_tokens, device_of(options.device),
    )  # fmt: skip
