"""One question, asked with all visual tokens and with those that each method keeps: answers, what was kept, times."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers import prune_visual_tokens
from ..integrations.transformers.pruning import Pruning
from . import DemoError
from .checkpoint import Checkpoint

ALL = "all tokens"


@dataclass
class Row:
    """A way to ask, and what came of it. pruning None: with all visual tokens. spent: on selection and compaction."""

    name: str
    pruning: Pruning | None
    before: int
    after: int
    answer: str = ""
    boxes: Tensor | None = None
    seconds: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)

    def block(self) -> Any:
        return nullcontext() if self.pruning is None else self.pruning

    def median(self) -> float:
        return statistics.median(self.seconds)

    def share(self) -> float:
        """The part of the prefill that selection and compaction took."""
        return statistics.median(spent / seconds for spent, seconds in zip(self.spent, self.seconds, strict=True))


def count_visual(checkpoint: Checkpoint, inputs: Any) -> int:
    return int(torch.isin(inputs["input_ids"], checkpoint.visual_ids()).sum())


def rows(checkpoint: Checkpoint, names: Sequence[str], before: int, keep: int, seed: int) -> list[Row]:
    """The row without pruning, then one for each method."""
    try:
        prunings = [prune_visual_tokens(checkpoint.model, name, keep, seed=seed) for name in names]
    except (NotImplementedError, ValueError) as error:
        raise DemoError(f"--model: {error}") from None
    return [Row(ALL, None, before, before), *(Row(p.method, p, before, before) for p in prunings)]


def ask(row: Row, checkpoint: Checkpoint, inputs: Any, max_new_tokens: int) -> None:
    """The greedy answer, and which boxes of the image the kept tokens see."""
    try:
        with torch.inference_mode(), row.block():
            ids = checkpoint.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    except NotImplementedError as error:  # the integration's: a cache or mask that it has no way with
        raise DemoError(f"--model: {error}") from None
    new = ids[0, inputs["input_ids"].shape[1] :]
    row.answer = " ".join(checkpoint.tokenizer.decode(new, skip_special_tokens=True).split())
    if row.pruning is not None:
        row.after = row.pruning.stats["after"][0]
        row.boxes = row.pruning.boxes()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_prefill(row: Row, checkpoint: Checkpoint, inputs: Any) -> None:
    """One forward of the whole model, vision tower included, with the logits that generate asks for."""
    device = checkpoint.model.device
    with torch.inference_mode(), row.block():
        _synchronise(device)
        start = time.perf_counter()
        checkpoint.model(**inputs, use_cache=True, logits_to_keep=1)
        _synchronise(device)
        row.seconds.append(time.perf_counter() - start)
    if row.pruning is not None:
        stats = row.pruning.stats
        row.spent.append((stats["select_ms"] + stats["compact_ms"]) / 1e3)


def ask_and_time(
    rows: Sequence[Row],
    checkpoint: Checkpoint,
    inputs: Any,
    *,
    max_new_tokens: int,
    repeats: int,
    step: Callable[[Row, bool], None],
) -> None:
    """All answers first, which are the warm-up; then rounds in which each row is timed once, so that a busy machine
    disturbs all alike. After each, step(row, whether its answer has just come) is called."""
    for row in rows:
        ask(row, checkpoint, inputs, max_new_tokens)
        step(row, True)
    for _ in range(repeats):
        for row in rows:
            time_prefill(row, checkpoint, inputs)
            step(row, False)
