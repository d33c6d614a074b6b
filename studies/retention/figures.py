"""The figures of docs/retention.md: accuracy over the budget, and what was kept where pruning changed the answer."""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from studies.vqa.evaluate import Item
from studies.vqa.model import SIDE
from studies.vqa.scene import CELL, PATCH, scene
from tokenprune_kernels.integrations.transformers.overlay import overlay

from .measure import TOKENS, UNPRUNED
from .page import keeps
from .results import Table
from .statistics import mean_share, share

SIZE = SIDE * PATCH
CAPTION = 62
GAP = 14


class Failure(NamedTuple):
    """A question that the unpruned model answers correctly and the pruned one does not."""

    method: str
    item: Item
    given: str
    kept: Tensor


def plot(table: Table, path: Path) -> None:
    """Accuracy of every method over the share of tokens kept, with 95% intervals."""
    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=110)
    colours = plt.get_cmap("tab20")
    shares = [keep / TOKENS for keep in keeps(table)]
    best_first = sorted(table.methods(), key=lambda method: -mean_share(table.of(method, keeps(table)[-1])).value)
    for number, method in enumerate(best_first):
        values = [mean_share(table.of(method, keep)) for keep in keeps(table)]
        middle = np.array([v.value for v in values]) * 100
        error = np.array([[v.value - v.low, v.high - v.value] for v in values]).T * 100
        style = {"color": "0.45", "linestyle": "--"} if method == "random" else {"color": colours(number)}
        marker = "os"[number % 2]  # beside the lighter tone of the same colour
        axes.errorbar(np.array(shares) * 100, middle, yerr=error, label=method, marker=marker, ms=4, capsize=2, **style)
    full = share(table.right[UNPRUNED]).value * 100
    axes.axhline(full, color="black", linewidth=1, label="all tokens")
    axes.set_xscale("log")
    axes.set_xticks([100 * s for s in shares], [f"{100 * s:.1f}%" for s in shares], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _tile(failure: Failure, split: str) -> Image.Image:
    """The image with dropped tokens dark, a frame around every cell the answer depends on."""
    pixels = Image.fromarray(scene(split, failure.item.seed).pixels)
    corner = torch.stack([failure.kept % SIDE, failure.kept // SIDE], 1)
    shown = overlay(pixels, torch.cat([corner, corner + 1], 1) / SIDE)
    tile = Image.new("RGB", (SIZE, SIZE + CAPTION), (16, 19, 24))
    tile.paste(shown, (0, CAPTION))
    draw = ImageDraw.Draw(tile)
    for row, column in failure.item.question.cells:
        x, y = column * CELL, CAPTION + row * CELL
        draw.rectangle((x + 1, y + 1, x + CELL - 2, y + CELL - 2), outline=(255, 196, 61), width=2)
    question = failure.item.question
    draw.text((4, 2), failure.method, font=ImageFont.load_default(16), fill=(255, 196, 61))
    draw.text((4, 22), question.text, font=ImageFont.load_default(13), fill=(238, 240, 244))
    draw.text(
        (4, 40), f"{question.answer}; pruned: {failure.given}", font=ImageFont.load_default(13), fill=(150, 158, 170)
    )
    return tile


def failures_sheet(failures: list[Failure], split: str, path: Path, columns: int = 4) -> None:
    """One row of images after the other."""
    rows = -(-len(failures) // columns)
    width, height = SIZE + GAP, SIZE + CAPTION + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), (16, 19, 24))
    for number, failure in enumerate(failures):
        row, column = divmod(number, columns)
        sheet.paste(_tile(failure, split), (GAP + column * width, GAP + row * height))
    sheet.save(path, quality=82)
