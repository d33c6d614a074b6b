"""Predicted times: what a launch takes by the counts of its loops, and that the page shows them."""

import functools

import pytest
import torch

from bench.gpu_suite import model, predictions
from bench.gpu_suite.floors import ASSUMED
from testing.cuda_costs import Cost


@functools.cache
def figures() -> dict[str, predictions.Figures]:
    return dict(predictions.figures())


def test_the_page_has_the_figures_of_the_tables() -> None:
    page = predictions.PAGE.read_text()
    assert predictions.refreshed(page, figures()) == page, "run python -m bench.gpu_suite.predictions --write"


def test_no_prediction_is_below_its_floor() -> None:
    low = {name: of for name, of in figures().items() if of.floor is not None and of.least < 0.999 * of.floor}
    assert not low


def test_a_row_without_a_line_on_the_page_is_reported() -> None:
    page = predictions.PAGE.read_text()
    more = figures() | {"another row": predictions.Figures(1.0, 1.0, 2.0, "issue")}
    with pytest.raises(SystemExit, match="another row"):
        predictions.refreshed(page, more)


def test_limits_of_a_launch_by_hand() -> None:
    cost = Cost(
        1000, slots=64, least=48, matrix=16, around=128, around_least=32, nest=192, nest_least=80, fences=1, barriers=2
    )
    launch = model.Launch(
        "f", units=1600, trips=2, pieces=198, exponentials=3200, dram=4.3e6, l2=5.5e6, steps=10, step_trips=3
    )
    found = model.limit_seconds(launch, cost)
    share = 2 / 198  # the second round has work for half of the 132 multiprocessors
    cycle = 1 / ASSUMED["clock"]
    assert found["issue"] == pytest.approx(1600 * (64 + 128 / 2) / 16 * share / 4 * cycle)
    assert found["tensor"] == pytest.approx(1600 * share * ASSUMED["cycles of a matrix instruction"] / 4 * cycle)
    assert found["MUFU"] == pytest.approx(3200 * share / 16 * cycle)
    assert found["DRAM"] == pytest.approx(1e-6)
    assert found["L2"] == pytest.approx(1e-6)
    step = (192 + 2 * 64) * ASSUMED["cycles of a lone warp"] + 2 * ASSUMED["cycles of a barrier"]
    assert found["latency"] == pytest.approx(10 * step * cycle)
    least = model.limit_seconds(launch, cost, least=True)
    assert least["issue"] == pytest.approx(1600 * (48 + 32 / 2) / 16 * share / 4 * cycle)
    step = (80 + 2 * 48) * ASSUMED["cycles of a lone warp"] + 2 * ASSUMED["cycles of a barrier"]
    assert least["latency"] == pytest.approx(10 * step * cycle)


def test_matrix_instructions_of_attention_are_those_of_its_tiles() -> None:
    query, key = torch.empty(1, 4, 70, 128, dtype=torch.float16), torch.empty(1, 2, 65, 128, dtype=torch.float16)
    rows, *_, columns = [launch for launch in model.attention(True, True, query, key) if launch.units]
    assert rows.units == 2 * (192 / 16) * (128 / 8) * (128 / 16)  # 140 rows of a key head, 65 keys
    assert columns.units == 4 * (128 / 16) * (128 / 8) * (128 / 16)
    assert rows.trips == 2
