"""What a run leaves in studies/results/retention.json: every right and wrong answer, and the times."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from studies.vqa.evaluate import Item
from studies.vqa.questions import FAMILIES

from .measure import OWN, UNPRUNED, Outcome, Run, Variant


class Table(NamedTuple):
    """The runs of a results file; `right` and `covered` are [N] per run, in the order of the questions."""

    facts: dict[str, Any]
    families: np.ndarray[Any, Any]  # [N] of str
    right: dict[Run, Tensor]
    covered: dict[Run, float]
    seconds: dict[Run, float]

    def methods(self) -> list[str]:
        """Those that were measured, in the order of the runs."""
        return list(dict.fromkeys(run.method for run in self.right if run != UNPRUNED))

    def variants(self) -> list[Variant]:
        """Layers and position ids, the methods' own first."""
        return list(dict.fromkeys(run.variant for run in self.right))

    def of_runs(self, method: str, keep: int, variant: Variant = OWN) -> list[Run]:
        """The runs of a method at a budget: one, or one per seed."""
        return [run for run in self.right if (run.method, run.keep, run.variant) == (method, keep, variant)]

    def of(self, method: str, keep: int, variant: Variant = OWN) -> Tensor:
        """[seeds, N]: right answers of a method at a budget."""
        return torch.stack([self.right[run] for run in self.of_runs(method, keep, variant)])

    def by_family(self, right: Tensor) -> list[float]:
        """The accuracy of each family, of answers [R, N] or [N]."""
        each = right.double().reshape(-1, right.shape[-1]).mean(0)
        return [each[self.families == name].mean().item() for name in FAMILIES]


def _packed(bits: Tensor) -> str:
    return np.packbits(bits.numpy()).tobytes().hex()


def _unpacked(text: str, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:count].astype(bool))


def save(
    path: Path, facts: dict[str, Any], asked: list[Item], outcomes: dict[Run, Outcome], seconds: dict[Run, float]
) -> None:
    """Write the file; answers are bits in hexadecimal, families in the order of the questions."""
    rows = [
        {
            **run._asdict(),
            "accuracy": round(outcome.right.double().mean().item(), 6),
            "covered": round(outcome.covered.nanmean().item(), 4),
            "seconds": seconds.get(run),
            "right": _packed(outcome.right),
        }
        for run, outcome in outcomes.items()
    ]
    counts = {name: sum(item.question.family == name for item in asked) for name in FAMILIES}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({**facts, "families": counts}, indent=1)[:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "runs": [\n  {lines}\n ]\n}}\n')


def load(path: Path) -> Table:
    """Read what `save` wrote."""
    content = json.loads(path.read_text())
    rows = content.pop("runs")
    families = np.repeat(list(content["families"]), list(content["families"].values()))
    runs = [(Run(row["method"], row["keep"], row["layer"], row["seed"], row.get("positions")), row) for row in rows]
    assert runs[0][0] == UNPRUNED
    return Table(
        content,
        families,
        {run: _unpacked(row["right"], len(families)) for run, row in runs},
        {run: row["covered"] for run, row in runs},
        {run: row["seconds"] for run, row in runs if row["seconds"] is not None},
    )
