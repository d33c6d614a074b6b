"""`python -m studies.vqa.card studies/models/tiny-llava-vqa`: measure the model and fill the numbers of its card.

Writes training.png (the curves of training.csv) and example.png (a scene of the test split) beside it.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from testing.pages import fill

from .evaluate import accuracy, by_family, load
from .forward import Losses
from .questions import FAMILIES, chance
from .scene import scene
from .train import STAGES

EXAMPLE = 0  # the seed of example.png
QUESTIONS = {
    "exist": "is there a 5?", "count": "how many 3s are there?", "patch": "which digit is on the brick?",
    "corner": "what is in the top right corner?", "relation": "what is left of the 7?", "tiny": "which digit is tiny?",
    "colour": "what colour is the 4?", "compare": "which is larger, the red digit or the blue digit?",
    "add": "what is the red digit plus the blue digit?",
}  # fmt: skip


def accuracy_table(folder: Path, per_family: int) -> str:
    """Per family: test, validation, and what the words of the question alone would give."""
    model = load(folder)
    asked, right = accuracy(model, "test", per_family)
    checked, validated = accuracy(model, "validation", per_family)
    guess = chance([item.question for item in asked])
    test, validation = by_family(asked, right), by_family(checked, validated)
    lines = ["| family | for example | test | validation | words alone |", "|---|---|---|---|---|"]
    for name in FAMILIES:
        cells = (QUESTIONS[name], f"**{test[name]:.1%}**", f"{validation[name]:.1%}", f"{guess[name]:.1%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    whole = (f"**{right.double().mean():.1%}**", f"{validated.double().mean():.1%}")
    lines.append(f"| all | | {whole[0]} | {whole[1]} | {sum(guess.values()) / len(guess):.1%} |")
    command = f"python -m studies.vqa.card studies/models/tiny-llava-vqa --per-family {per_family}"
    return "\n".join([*lines, "", f"`{command}`"])


def curriculum_table(log: list[dict[str, str]]) -> str:
    """The stages, and how long each took."""
    lines = [
        "| stage | scenes | images per step | tokens of questions | steps | minutes |",
        "|---|---|---|---|---|---|",
    ]
    start = 0.0
    for number, stage in enumerate(STAGES):
        end = max(float(row["seconds"]) for row in log if row["stage"] == str(number))
        cells = (
            f"{stage.cells} x {stage.cells} cells",
            stage.batch,
            stage.text,
            stage.steps,
            round((end - start) / 60, 1),
        )
        lines.append(f"| {number} | " + " | ".join(map(str, cells)) + " |")
        start = end
    return "\n".join(lines)


def log_plot(rows: list[dict[str, str]], path: Path) -> None:
    """Losses and accuracies over the training, from training.csv."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), dpi=100)
    minutes = [float(row["seconds"]) / 60 for row in rows]
    parts = [name for name in Losses._fields if name != "named"]
    for name in parts:
        # A part that a stage does not have is empty or zero.
        left.plot(minutes, [float(row[name] or 0) or np.nan for row in rows], label=name, linewidth=1)
    left.set_yscale("log")
    left.set_title("losses")
    for name in ("named", *FAMILIES):
        right.plot(minutes, [float(row[name]) if row[name] else np.nan for row in rows], label=name, linewidth=1)
    right.set_title("accuracy on the training split")
    for axes in (left, right):
        axes.set_xlabel("minutes of training")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-family", type=int, default=150)
    options = parser.parse_args()
    card, folder = options.folder / "README.md", options.folder
    with (folder / "training.csv").open() as file:
        log = list(csv.DictReader(file))
    log_plot(log, folder / "training.png")
    Image.fromarray(scene("test", EXAMPLE).pixels).save(folder / "example.png")
    text = fill(card.read_text(), "curriculum", curriculum_table(log))
    with torch.inference_mode():
        text = fill(text, "accuracy", accuracy_table(folder, options.per_family))
    card.write_text(text)


if __name__ == "__main__":
    main()
