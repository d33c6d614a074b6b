"""`bench --quick`: results are compared before anything is timed, and times are told as they were taken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from testing.process import printed
from tests.demo.case import refused
from tokenprune_kernels.__main__ import main
from tokenprune_kernels.quick import race, report, rows, run

CPU = torch.device("cpu")
TOY = replace(
    rows.LLAVA, tokens=100, grid=(10, 10), query_heads=4, key_heads=4, head_dim=16, hidden=64, vision_hidden=32,
    layers=2, keep=20, question=6,
)  # fmt: skip


def row_of(ours: Any, replaced: Any, picks: bool) -> rows.Row:
    return rows.Row("step", "1 -> 1", "loop", "select_topk", lambda device: rows.Pair(ours, replaced, picks))


@pytest.mark.parametrize("row", [row for row in rows.rows() if row.name != "KV cache"], ids=lambda row: row.name)
def test_results_at_the_sizes_that_are_timed_are_the_same(row: rows.Row) -> None:
    same, wrong = race.compared(row.make(CPU))
    assert wrong == ""
    assert same is None or same[0] == same[1] > 50


@pytest.mark.parametrize("row", rows.rows(TOY), ids=lambda row: row.name)
def test_each_row_is_checked_and_timed(row: rows.Row) -> None:
    outcome = race.race(row, CPU, 0.0)
    assert outcome.wrong == ""
    assert outcome.seconds is not None
    assert min(outcome.seconds) > 0
    assert outcome.rounds == race.MIN_ROUNDS
    assert outcome.backend in ("cpu", "reference")


def test_making_inputs_leaves_the_users_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for row in rows.rows(TOY):
        row.make(CPU)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("ours", "replaced", "picks", "says"),
    [
        (torch.arange(10), torch.arange(2, 12), True, "only 8 of 10 tokens are the same"),
        (torch.ones(3), torch.ones(3) * 1.01, False, "values differ by 0.01, the largest is 1"),
        (torch.full((3,), torch.nan), torch.ones(3), False, "values differ by nan"),
        ([torch.ones(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)], False, "values differ by 1"),
    ],
)
def test_what_is_wrong_is_told_and_not_timed(
    ours: Any,
    replaced: Any,
    picks: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "rows", lambda: [row_of(lambda: ours, lambda: replaced, picks)])
    assert main(["bench", "--quick", "--device", "cpu"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not timed" in line)
    assert says in line
    assert "#" not in line


def test_both_are_timed_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def named(name: str) -> Any:
        return lambda: called.append(name) or torch.ones(1)

    monkeypatch.setattr(race, "BURST_SECONDS", 0.0)  # one call each time
    outcome = race.race(row_of(named("ours"), named("loop"), picks=False), CPU, 0.0)
    assert called == ["ours", "loop"] * (2 + outcome.rounds)  # compared, called once, and the rounds


def outcome_of(name: str, ours: float, replaced: float, same: tuple[int, int] | None = None) -> race.Outcome:
    row = row_of(None, None, False)._replace(name=name)
    return race.Outcome(row, "cpu", (ours, replaced), 5, same)


def test_table_and_bars() -> None:
    lines = report.table([outcome_of("one", 0.002, 0.016, (9, 10)), outcome_of("two", 3e-6, 6e-6)])
    assert [line.split("  ")[0] for line in lines] == ["step", "one", "two"]
    assert "2 ms" in lines[1]
    assert "16 ms (loop)" in lines[1]
    assert "8.0x" in lines[1]
    assert "9 of 10" in lines[1]
    assert lines[1].endswith("#" * 24)
    assert "3 us" in lines[2]
    assert lines[2].endswith("yes          " + "#" * 8)  # log 2 of log 8
    slower = report.table([outcome_of("slower", 2e-3, 1e-3), outcome_of("faster", 1e-3, 2e-3)])
    assert [line.count("#") for line in slower] == [0, 0, 24]
    assert len({line.index("backend" if n == 0 else "cpu") for n, line in enumerate(lines)}) == 1


def test_picture_has_a_bar_for_each_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    path = tmp_path / "bars.png"
    report.draw([outcome_of(f"row {n}", 1e-3, 4e-3) for n in range(5)], "title", path)
    with image.open(path) as drawn:
        assert drawn.format == "PNG"
        pixels, middle = drawn.convert("RGB"), drawn.width * 6 // 10
    bars = [pixels.getpixel((middle, y)) == (0x2F, 0x6F, 0x9F) for y in range(pixels.height)]
    assert sum(a and not b for a, b in zip(bars, [*bars[1:], False], strict=True)) == 5


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "rows", lambda: rows.rows(TOY))
    monkeypatch.setattr(run, "SECONDS", 0.0)
    out = tmp_path / "bars.png"
    drawn: list[Any] = []
    monkeypatch.setattr(run, "draw", lambda outcomes, title, path: drawn.extend([len(outcomes), title, path]))
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: object())
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed_lines, progress = capsys.readouterr()
    names = [row.name for row in rows.rows()]
    assert progress.splitlines() == [f"timing: {name}" for name in names]
    assert printed_lines.startswith("tokenprune_kernels ")
    assert [name for name in names if f"\n{name}" in printed_lines] == names
    assert printed_lines.endswith(f"bars: {out}\n")
    assert drawn[0] == len(names)
    assert drawn[2] == out


def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "`make bench` in a checkout" in refused(capsys, "bench")
    assert "ends in .png" in refused(capsys, "bench", "--quick", "--out", str(tmp_path / "bars.svg"))
    assert "no such folder" in refused(capsys, "bench", "--quick", "--out", str(tmp_path / "no" / "bars.png"))
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    line = refused(capsys, "bench", "--quick", "--out", str(tmp_path / "bars.png"))
    assert "matplotlib is not installed, run: pip install matplotlib" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in refused(capsys, "bench", "--quick", "--device", "cuda")


def test_nothing_but_torch_is_needed() -> None:
    program = (
        "import sys\n"
        "for name in ('numpy', 'rich', 'PIL', 'transformers', 'matplotlib', 'triton'): sys.modules[name] = None\n"
        "from tokenprune_kernels.quick import race, report, rows\n"
        "import torch\n"
        "row = rows.rows()[0]\n"
        "print(report.table([race.race(row, torch.device('cpu'), 0.0)])[1])"
    )
    assert printed("-W", "ignore", "-c", program).startswith("attention scores")
