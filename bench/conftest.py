"""The `race` fixture: contestants of one case, checked for equal results, then timed in turn within one run."""

import time
from collections.abc import Callable
from typing import Any

import pytest

Contestant = Callable[[], Any]


@pytest.fixture
def race(benchmark: Any) -> Callable[..., dict[str, float]]:
    """race(case, {"ours": f, "reference": g, ...}, check=..., target=("reference", 1.4)).

    `check(results)` receives {name: result} and must raise when they disagree: an op whose result is wrong is not
    timed. Contestants then take turns, round by round, so that a drift of the machine hits all alike; the best round
    counts. The ratios go into the benchmark's extra_info, which bench/report.py turns into the table.
    """

    def run(
        case: str,
        contestants: dict[str, Contestant],
        *,
        check: Callable[[dict[str, Any]], None],
        target: tuple[str, float] | None = None,
        seconds: float = 2.0,
        note: str = "",
    ) -> dict[str, float]:
        check({name: f() for name, f in contestants.items()})
        best = dict.fromkeys(contestants, float("inf"))
        began, rounds = time.perf_counter(), 0
        while rounds < 5 or (time.perf_counter() - began < seconds and rounds < 1000):
            for name, f in contestants.items():
                start = time.perf_counter()
                f()
                best[name] = min(best[name], time.perf_counter() - start)
            rounds += 1
        benchmark.group = case
        benchmark.extra_info.update(
            case=case, seconds=best, rounds=rounds, target=target, note=note,
            ratios={name: t / best["ours"] for name, t in best.items()},
        )  # fmt: skip
        benchmark.pedantic(contestants["ours"], rounds=3, warmup_rounds=0)
        return best

    return run
