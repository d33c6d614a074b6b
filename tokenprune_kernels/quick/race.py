"""Two functions checked against each other, then timed in turn."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .._backend import served_by
from .rows import Pair, Result, Row

MIN_SAME = 0.9  # of two lists of picks: a near tie of a greedy pick changes the picks after it
TOLERANCE = 2e-3  # of values, in parts of the largest
BURST_SECONDS = 1e-3  # calls that are shorter are timed several in a row
MIN_ROUNDS, MAX_ROUNDS = 3, 500


class Outcome(NamedTuple):
    """seconds: of ours and of what it replaces, the best round. same: picks that both have, or None for values."""

    row: Row
    backend: str
    seconds: tuple[float, float] | None
    rounds: int
    same: tuple[int, int] | None
    wrong: str = ""

    @property
    def ratio(self) -> float:
        assert self.seconds is not None
        return self.seconds[1] / self.seconds[0]


def compared(pair: Pair) -> tuple[tuple[int, int] | None, str]:
    """How many picks both have of how many, and what is wrong with ours, if anything is."""
    ours, replaced = pair.ours(), pair.replaced()
    if pair.picks:
        return _same_picks(ours, replaced)
    return None, _unlike(ours, replaced)


def _same_picks(ours: Result, replaced: Result) -> tuple[tuple[int, int], str]:
    assert isinstance(ours, torch.Tensor)
    assert isinstance(replaced, torch.Tensor)
    wanted = set(replaced.flatten().tolist())
    same = len(wanted & set(ours.flatten().tolist()))
    few = f"only {same} of {len(wanted)} tokens are the same" if same < MIN_SAME * len(wanted) else ""
    return (same, len(wanted)), few


def _unlike(ours: Result, replaced: Result) -> str:
    pairs = [(ours, replaced)] if isinstance(ours, torch.Tensor) else list(zip(ours, replaced, strict=True))
    for got, wanted in pairs:
        assert isinstance(wanted, torch.Tensor)
        largest = float(wanted.abs().max())
        worst = float((got.double() - wanted.double()).abs().max())
        if not worst <= TOLERANCE * largest:
            return f"values differ by {worst:.2g}, the largest is {largest:.2g}"
    return ""


def _burst(function: Callable[[], Result], calls: int, device: torch.device) -> float:
    """Seconds of a call, what the device still has to do included."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


@torch.inference_mode()
def race(row: Row, device: torch.device, seconds: float) -> Outcome:
    """Rounds in which each is timed once, so that a busy machine disturbs both alike, for about so many seconds."""
    pair = row.make(device)
    backend = served_by(row.op, torch.empty(0, device=device))
    same, wrong = compared(pair)
    if wrong:
        return Outcome(row, backend, None, 0, same, wrong)
    functions = (pair.ours, pair.replaced)
    calls = [max(1, int(BURST_SECONDS / max(_burst(f, 1, device), 1e-7))) for f in functions]
    best, rounds, began = [float("inf")] * 2, 0, time.perf_counter()
    while rounds < MIN_ROUNDS or (time.perf_counter() - began < seconds and rounds < MAX_ROUNDS):
        for number, function in enumerate(functions):
            best[number] = min(best[number], _burst(function, calls[number], device))
        rounds += 1
    return Outcome(row, backend, (best[0], best[1]), rounds, same)
