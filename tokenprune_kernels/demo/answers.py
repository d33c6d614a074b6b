"""One question, asked with all visual tokens and with those that each method keeps: answers, what was kept, times."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers import prune_visual_tokens
from ..integrations.transformers.pruning import Pruning
from ..integrations.transformers.registry import family_of
from ..integrations.transformers.report import Clock
from . import DemoError
from .checkpoint import Checkpoint

ALL = "all tokens"
# Parts of a prefill. The rest is the language model's.
VISION, SELECTION, COMPACTION = "vision tower", "selection", "compaction"


@dataclass
class Row:
    """A way to ask, and what came of it. pruning None: with all visual tokens.

    Seconds of every timed prefill: of all of it, and of its parts. steps: seconds of every decoding step of the answer.
    """

    name: str
    pruning: Pruning | None
    before: int
    after: int
    answer: str = ""
    boxes: Tensor | None = None
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {VISION: [], SELECTION: [], COMPACTION: []})
    steps: list[float] = field(default_factory=list)

    def block(self) -> Any:
        return nullcontext() if self.pruning is None else self.pruning

    def median(self) -> float:
        return statistics.median(self.seconds)

    def share(self) -> float:
        """The part of the prefill that selection and compaction took."""
        runs = zip(self.seconds, self.parts[SELECTION], self.parts[COMPACTION], strict=True)
        return statistics.median((select + compact) / seconds for seconds, select, compact in runs)

    def part(self, name: str) -> float:
        return statistics.median(self.parts[name])

    def language(self) -> float:
        """What is left of a prefill without its parts."""
        runs = zip(self.seconds, *self.parts.values(), strict=True)
        return float(statistics.median(seconds - sum(parts) for seconds, *parts in runs))

    def step(self) -> float | None:
        """A decoding step; None for an answer of one token, which the prefill gives."""
        return statistics.median(self.steps) if self.steps else None


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
    began: list[float] = []
    hook = checkpoint.model.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
    try:
        with torch.inference_mode(), row.block():
            ids = checkpoint.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        began.append(time.perf_counter())
    except NotImplementedError as error:  # the integration's: a cache or mask that it has no way with
        raise DemoError(f"--model: {error}") from None
    finally:
        hook.remove()
    # From one forward to the next, what generate does between them included; the first one is the prefill.
    row.steps = [after - before for before, after in pairwise(began[1:])]
    new = ids[0, inputs["input_ids"].shape[1] :]
    row.answer = " ".join(checkpoint.tokenizer.decode(new, skip_special_tokens=True).split())
    if row.pruning is not None:
        row.after = row.pruning.stats["after"][0]
        row.boxes = row.pruning.boxes()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _in_front_of_the_decoder(checkpoint: Checkpoint, clock: Clock) -> Iterator[None]:
    """Lets the clock run while a forward has not reached the decoder: vision tower, projector and embeddings."""
    core = (family := family_of(checkpoint.model)).core(checkpoint.model)
    begin = core.register_forward_pre_hook(lambda *_: clock.__enter__())
    end = family.decoder(core).register_forward_pre_hook(lambda *_: clock.__exit__())
    try:
        yield
    finally:
        begin.remove()
        end.remove()


def time_prefill(row: Row, checkpoint: Checkpoint, inputs: Any) -> None:
    """One forward of the whole model, vision tower included, with the logits that generate asks for."""
    device = checkpoint.model.device
    vision = Clock(device)
    with torch.inference_mode(), _in_front_of_the_decoder(checkpoint, vision), row.block():
        _synchronise(device)
        start = time.perf_counter()
        checkpoint.model(**inputs, use_cache=True, logits_to_keep=1)
        _synchronise(device)
        row.seconds.append(time.perf_counter() - start)
    stats = {} if row.pruning is None else row.pruning.stats
    spent = (vision.milliseconds(), stats.get("select_ms", 0.0), stats.get("compact_ms", 0.0))
    for of_part, milliseconds in zip(row.parts.values(), spent, strict=True):
        of_part.append(milliseconds / 1e3)


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
