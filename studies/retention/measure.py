"""Every method at every budget on the same questions: which answers are right, and what was kept of what mattered."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from studies.vqa.evaluate import Batch, Item, answered, batches, needed
from studies.vqa.model import SIDE
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens
from tokenprune_kernels.integrations.transformers.pruning import IN_MODEL
from tokenprune_kernels.methods import get_method

TOKENS = SIDE * SIDE
KEEPS = (192, 128, 64, 32)  # 33.3%, 22.2%, 11.1%, 5.6% of 576
SEEDS = (0, 1, 2)
Variant = tuple[int | None, str | None]  # the layer and the position ids
OWN: Variant = (None, None)  # those of the method


class Run(NamedTuple):
    """A method at a budget; `layer` and `positions` other than the method's own, or None; `seed` of one that draws."""

    method: str
    keep: int
    layer: int | None = None
    seed: int | None = None
    positions: str | None = None

    @property
    def variant(self) -> Variant:
        return self.layer, self.positions


@dataclass
class Outcome:
    """Per item [N]: was the answer right, the share of the needed tokens that was kept (nan: none needed), the answer.

    kept: [N, K], the indices of the kept tokens.
    """

    right: Tensor
    covered: Tensor
    given: Tensor
    kept: Tensor

    @classmethod
    def empty(cls, count: int, keep: int) -> "Outcome":
        right, given = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
        return cls(right, torch.full((count,), torch.nan), given, torch.zeros(count, keep, dtype=torch.int64))


UNPRUNED = Run("none", TOKENS)


def runs(methods: tuple[str, ...] = METHODS, keeps: tuple[int, ...] = KEEPS, layer: int | None = None) -> list[Run]:
    """All of a table; a method that draws once per seed."""
    table = []
    for method in methods:
        for keep in keeps:
            where = layer if method in IN_MODEL else None
            seeds: tuple[int | None, ...] = SEEDS if "generator" in get_method(method).uses else (None,)
            table += [Run(method, keep, where, seed) for seed in seeds]
    return table


def with_other_positions(keep: int) -> list[Run]:
    """What the authors renumber with original position ids, and the other way round; in front of the model only."""
    other = {"original": "renumber", "renumber": "original"}
    before = tuple(method for method in METHODS if method not in IN_MODEL)
    return [run._replace(positions=other[get_method(run.method).positions]) for run in runs(before, (keep,))]


@contextmanager
def one_encoding(model: Any) -> Iterator[None]:
    """The vision tower sees each batch once: its second call on the same pixels returns what the first one did.

    It does not depend on what is pruned behind it, and half the work of a prefill of this small model is there.
    """
    tower = model.model.vision_tower
    forward, known = tower.forward, []

    def remembered(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not known or known[0] is not pixel_values:
            known[:] = [pixel_values, forward(pixel_values, *args, **kwargs)]
        return known[1]

    tower.forward = remembered
    try:
        yield
    finally:
        del tower.forward


def ask(model: Any, run: Run, inputs: dict[str, Tensor], index: int = 0) -> tuple[Tensor, Tensor]:
    """The answers, and [B, K] the kept tokens; `index` lets random draw anew for every batch."""
    if run == UNPRUNED:
        return answered(model, inputs), torch.arange(TOKENS).expand(len(inputs["input_ids"]), -1)
    seed = None if run.seed is None else run.seed * 1_000_003 + index
    with prune_visual_tokens(
        model, run.method, run.keep, layer=run.layer, seed=seed, positions=run.positions
    ) as pruning:
        words = answered(model, inputs)
        assert pruning.kept is not None
        return words, pruning.kept


def measure(
    model: Any, split: str, asked: list[Item], table: list[Run], size: int = 32, parts: Path | None = None
) -> dict[Run, Outcome]:
    """All runs on all items; a batch goes through every run before the next one is drawn.

    In the folder `parts` every batch leaves its outcomes, and what is there is not measured again.
    """
    outcomes = {run: Outcome.empty(len(asked), run.keep) for run in (UNPRUNED, *table)}
    # For a method that reads the tower's attention the tower has to run.
    reading = {run for run in table if "saliency" in get_method(run.method).uses}
    groups = [[run for run in outcomes if (run in reading) is reads] for reads in (False, True)]
    with tqdm(total=len(asked), desc="questions", mininterval=5) as bar:
        for batch in batches(split, asked, size):
            part = None if parts is None else parts / f"{batch.indices[0]}-{len(batch.indices)}.pt"
            known = _read(part)
            for group, tower in zip(groups, (one_encoding(model), nullcontext()), strict=True):
                with tower:
                    for run in group:
                        if run not in known:
                            known[run] = ask(model, run, batch.inputs, batch.indices[0])
            if part is not None:
                _write(part, known)
            pairs = zip(batch.images, batch.indices, strict=True)
            wanted = torch.stack([needed(image, asked[n].question) for image, n in pairs])
            for run, outcome in outcomes.items():
                _record(outcome, batch, wanted, *known[run])
            bar.update(len(batch.indices))
    return outcomes


def _read(part: Path | None) -> dict[Run, tuple[Tensor, Tensor]]:
    if part is None or not part.exists():
        return {}
    return {Run(*run): answers for run, answers in torch.load(part, weights_only=True).items()}


def _write(part: Path, known: dict[Run, tuple[Tensor, Tensor]]) -> None:
    """Whole or not at all: a run can be stopped at any moment."""
    part.parent.mkdir(parents=True, exist_ok=True)
    unfinished = part.with_suffix(".tmp")
    torch.save({tuple(run): answers for run, answers in known.items()}, unfinished)
    unfinished.replace(part)


def _record(outcome: Outcome, batch: Batch, wanted: Tensor, words: Tensor, kept: Tensor) -> None:
    chosen = torch.zeros_like(wanted).scatter_(1, kept, torch.ones_like(kept, dtype=torch.bool))
    outcome.right[batch.indices] = words == batch.answers
    outcome.given[batch.indices] = words
    outcome.covered[batch.indices] = (chosen & wanted).sum(1) / wanted.sum(1)  # 0 / 0 is nan: nothing was needed
    outcome.kept[batch.indices] = kept
