"""`python -m studies.vqa.train`: make the weights of the small model, from nothing, on a CPU.

The curriculum goes from single cells of the image to whole images: first the vision tower learns to name what it
sees, then questions join. Stopped at any time, the same command goes on from the last checkpoint.
"""

import argparse
import csv
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from . import model as tiny
from .batches import Batch, Batches
from .forward import Losses, losses
from .optimizer import optimizers
from .questions import FAMILIES

SEED = 0
RATE = 3e-3
WARMUP = 100  # steps
EVERY = 50  # steps between rows of the log
SAVE = 300  # seconds between checkpoints
COLUMNS = ("stage", "step", "seconds", *Losses._fields, *FAMILIES)


@dataclass(frozen=True)
class Stage:
    """`steps` batches of `batch` scenes of cells x cells, with `text` tokens of questions behind each."""

    cells: int
    text: int
    batch: int
    steps: int
    families: tuple[str, ...] = tuple(FAMILIES)
    rate: tuple[float, float] = (1.0, 1.0)  # of RATE, at the first step and behind the last
    ground: float = 0.0  # weight of the loss of what objects lie on
    look: float = 0.0  # weight of the loss of where answers look
    easy: tuple[int, int] = (0, 0)  # steps at which the easy beginning starts to fade, and has faded


# What takes two looks at the image is learned last.
STRESSED = (*FAMILIES, "relation", "colour", "add")
SPATIAL = ("relation", "relation", "patch", "count", "add")
STAGES = (
    Stage(cells=1, text=0, batch=32, steps=2000, easy=(300, 1200)),
    Stage(cells=2, text=0, batch=16, steps=600),
    Stage(cells=2, text=120, batch=16, steps=550),
    Stage(cells=2, text=0, batch=16, steps=1000),
    Stage(cells=2, text=0, batch=16, steps=1900),
    Stage(cells=4, text=240, batch=8, steps=250),
    Stage(cells=3, text=360, batch=8, steps=650, families=STRESSED, rate=(1.0, 0.618)),
    Stage(cells=3, text=240, batch=8, steps=500, families=STRESSED, rate=(0.8, 0.8), ground=0.25, look=0.5),
    Stage(cells=2, text=200, batch=16, steps=450, families=SPATIAL, rate=(0.8, 0.8), ground=1.0, look=1.0),
    Stage(cells=4, text=240, batch=8, steps=950, families=STRESSED, rate=(0.8, 0.0), ground=1.0, look=1.0),
)


def rate(stage: int, step: int) -> float:
    """A warm-up in the first stage, then as the stages say."""
    warm = min(1.0, (step + 1) / WARMUP) if stage == 0 else 1.0
    first, last = STAGES[stage].rate
    return RATE * warm * (first + (last - first) * step / STAGES[stage].steps)


@dataclass
class Meter:
    """Means over the steps since the last row of the log."""

    sums: torch.Tensor
    right: torch.Tensor
    asked: torch.Tensor
    steps: int = 0

    @classmethod
    def empty(cls) -> "Meter":
        return cls(torch.zeros(len(Losses._fields)), torch.zeros(len(FAMILIES)), torch.zeros(len(FAMILIES)))

    def add(self, values: list[float], batch: Batch, right: torch.Tensor) -> None:
        self.sums += torch.tensor(values)
        self.steps += 1
        asked = batch.family >= 0
        self.right.index_add_(0, batch.family[asked], right[asked].float())
        self.asked.index_add_(0, batch.family[asked], torch.ones(int(asked.sum())))

    def row(self) -> list[str]:
        """Losses, then the accuracy of each family; empty where nothing was asked."""
        means = [f"{value:.4f}" for value in (self.sums / self.steps).tolist()]
        pairs = zip(self.right.tolist(), self.asked.tolist(), strict=True)
        return means + [f"{right / asked:.4f}" if asked else "" for right, asked in pairs]


class Trainer:
    """The state that a checkpoint holds: weights, optimizers, and how far the curriculum is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: LlavaForConditionalGeneration = tiny.build(SEED)
        self.model.set_attn_implementation({"text_config": "packed_questions", "vision_config": "sdpa"})
        self.model.train()
        self.optimizers = optimizers(self.model, RATE)
        self.stage = self.step = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.folder / "training.csv"

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        rows = [line.split(",") for line in self.log.read_text().splitlines()[1:]] if self.log.exists() else []
        done = [row for row in rows if (int(row[0]), int(row[1])) <= (self.stage, self.step)]
        self._start_log(done)
        print(f"going on at stage {self.stage}, step {self.step}", flush=True)

    def save(self) -> None:
        """Written beside and moved, so that a stop in between leaves the old one."""
        state = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "stage": self.stage, "step": self.step, "seconds": self.seconds,
        }  # fmt: skip
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def _start_log(self, rows: list[list[str]]) -> None:
        with self.log.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])

    def _write(self, meter: Meter) -> None:
        with self.log.open("a", newline="") as file:
            csv.writer(file).writerow([self.stage, self.step, round(self.seconds), *meter.row()])

    def _update(self, batch: Batch) -> tuple[list[float], torch.Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(self.stage, self.step)
        parts, right = losses(self.model, batch)
        parts.total(STAGES[self.stage].ground, STAGES[self.stage].look).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return [value.item() for value in parts], right

    def run(self, workers: int) -> None:
        """All that is left of the curriculum."""
        if not self.log.exists():
            self._start_log([])
        while self.stage < len(STAGES):
            stage = STAGES[self.stage]
            data = Batches("train", stage.cells, stage.batch, stage.text, SEED + self.stage, stage.families, stage.easy)
            loader = DataLoader(Subset(data, range(self.step, stage.steps)), batch_size=None, num_workers=workers)
            meter, last, saved = Meter.empty(), time.monotonic(), time.monotonic()
            with tqdm(total=stage.steps, initial=self.step, desc=f"stage {self.stage}", mininterval=10) as bar:
                for batch in loader:
                    values, right = self._update(batch)
                    meter.add(values, batch, right)
                    self.step += 1
                    now = time.monotonic()
                    self.seconds, last = self.seconds + now - last, now
                    bar.update()
                    if self.step % EVERY == 0:
                        self._write(meter)
                        meter = Meter.empty()
                        if now - saved > SAVE:
                            self.save()
                            saved = now
            self.stage, self.step = self.stage + 1, 0
            self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/vqa"), help="checkpoint and log (default: build/vqa)")
    parser.add_argument("--out", type=Path, help="where the finished model goes (default: nowhere)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw images (default: 1)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_flush_denormal(True)
    trainer = Trainer(options.work)
    trainer.run(options.workers)
    if options.out is not None:
        tiny.save(trainer.model, options.out)
        (options.out / "training.csv").write_text(trainer.log.read_text())


if __name__ == "__main__":
    main()
