"""The command: ask a model about an image with all visual tokens and with few; show answers, times, kept tokens."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console

from ..methods import get_method
from . import DemoError, example, panel
from .answers import Row, ask_and_time, count_visual, rows
from .checkpoint import load as load_checkpoint
from .checkpoint import quiet
from .options import check, kept_of
from .photo import load as load_image
from .report import caption, progress, table, times


def tiles(results: Sequence[Row]) -> list[panel.Tile]:
    """The image with the full answer, then a tile for each method."""
    full, *pruned = results
    out = [panel.Tile("All tokens", _spoken(full), f"{full.before} visual tokens", None)]
    for row in pruned:
        method = get_method(row.name)
        kept = f"{method.title}: {row.after} kept"
        out.append(panel.Tile(kept, _spoken(row), method.summary, row.boxes, row.answer != full.answer))
    return out


def _spoken(row: Row) -> str:
    return f"answer: {row.answer or '(nothing)'}"


def _save(image: Image.Image, path: Path) -> None:
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise DemoError(f"--out: cannot write {path}: {error.strerror or error}") from None


def run(arguments: argparse.Namespace) -> int:
    """The command `demo`; raises DemoError with one line when it cannot do what was asked."""
    options = check(arguments)
    folder = example.model_folder(arguments.model)
    image = load_image(Path(arguments.image).expanduser() if arguments.image else example.image_path(folder))
    question = " ".join((arguments.question or example.QUESTION).split())
    own = arguments.image is not None or question != example.QUESTION
    correct = None if own else example.ANSWER

    with quiet():
        checkpoint = load_checkpoint(folder, options.device)
        image = checkpoint.seen(image)
        inputs = checkpoint.prompt(image, question)
        before = count_visual(checkpoint, inputs)
        keep = kept_of(options.keep, before)
        results = rows(checkpoint, options.methods, before, keep, options.seed)
        with progress(len(results) * (1 + options.repeats), Console(stderr=True)) as step:
            ask_and_time(
                results, checkpoint, inputs,
                max_new_tokens=options.max_new_tokens, repeats=options.repeats, step=step,
            )  # fmt: skip

    subtitle = f"{keep} of {before} visual tokens" + (f"; correct: {correct}" if correct else "")
    _save(panel.draw(image, question, subtitle, tiles(results)), options.out)

    console = Console(markup=False, highlight=False, emoji=False)
    note = caption(results, options.repeats, options.device, checkpoint.model.dtype, correct)
    console.print(table(question, results, note))
    console.print(times(results))
    for line in example.notes(folder, checkpoint.tokenizer, question, own=own):
        console.print(line, soft_wrap=True)
    console.print(f"panel: {options.out}", soft_wrap=True)
    return 0
