"""The prefill of one question, pruned and not: rounds take turns, the best round of each counts."""

import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .measure import UNPRUNED, Run, ask


def _seconds(model: Any, run: Run, inputs: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    ask(model, run, inputs)
    return time.perf_counter() - start


def prefill_seconds(model: Any, table: list[Run], inputs: dict[str, Tensor], rounds: int) -> dict[Run, float]:
    """Vision tower, selection and decoder together, up to the first word of the answer."""
    once = [run for run in table if run.seed in (None, 0)]
    best = dict.fromkeys((UNPRUNED, *once), float("inf"))
    with torch.inference_mode():
        for _ in tqdm(range(rounds + 1), desc="timing", mininterval=5):
            for run in best:
                best[run] = min(best[run], _seconds(model, run, inputs))
    return best
