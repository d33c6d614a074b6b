"""The `race` fixture: functions of one case, checked for equal results, then timed in turn within one run."""

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

Function = Callable[[], Any]
PATIENCE = 30.0  # seconds after which two rounds are enough: an eager reference can take a minute


@contextlib.contextmanager
def busy_cores() -> Iterator[int]:
    """Starts as many processes that compute without end as torch has threads."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(torch.get_num_threads())]
    try:
        yield len(others)
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.fixture
def race(benchmark: Any) -> Callable[..., dict[str, float]]:
    """race(case, {"ours": f, "reference": g, ...}, check=..., target=("reference", 1.4)).

    `check(results)` receives {name: result} and must raise when they disagree: an op whose result is wrong is not
    timed. Functions then take turns, round by round, so that a drift of the machine hits all alike; the best round
    counts. With `busy` other processes want all cores meanwhile and the median counts, since what is asked is how long
    a call usually takes there. The ratios go into the benchmark's extra_info, of which bench/report.py makes the table.
    """

    def run(
        case: str,
        functions: dict[str, Function],
        *,
        check: Callable[[dict[str, Any]], None],
        target: tuple[str, float] | None = None,
        seconds: float = 2.0,
        note: str = "",
        busy: bool = False,
    ) -> dict[str, float]:
        check({name: f() for name, f in functions.items()})
        taken: dict[str, list[float]] = {name: [] for name in functions}
        rounds, spent = 0, 0.0
        with busy_cores() if busy else contextlib.nullcontext() as others:
            if others:
                case, note = f"{case}, beside {others} busy processes", "median"
            began = time.perf_counter()
            while rounds < (5 if spent < PATIENCE else 2) or (spent < seconds and rounds < 1000):
                for name, f in functions.items():
                    start = time.perf_counter()
                    f()
                    taken[name].append(time.perf_counter() - start)
                rounds += 1
                spent = time.perf_counter() - began
        best = {name: statistics.median(times) if busy else min(times) for name, times in taken.items()}
        benchmark.group = case
        benchmark.extra_info.update(
            case=case, seconds=best, rounds=rounds, target=target, note=note,
            ratios={name: t / best["ours"] for name, t in best.items()},
        )  # fmt: skip
        benchmark.pedantic(functions["ours"], rounds=3, warmup_rounds=0)
        return best

    return run
