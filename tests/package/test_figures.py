"""What pages show of the committed results is up to date, in figures and tables; equal numbers give equal bytes."""

from pathlib import Path

import pytest

from scripts import figures, shown, update_readme
from testing import ROOT
from testing.pages import section


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_of_the_committed_results(name: str) -> None:
    assert figures.up_to_date(name), "run: make readme"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_shows_something(name: str) -> None:
    numbers = figures.FIGURES[name][0]()
    assert len(numbers) >= 3
    for panel in numbers:
        if isinstance(panel, figures.Panel):
            assert all(len(line.points) >= 3 for line in panel.lines), panel.title
            assert len({tuple(size for size, _ in line.points) for line in panel.lines}) == 1
        else:
            assert panel.value > 0


def test_other_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [row._replace(ratio=row.ratio * 1.01) for row in figures.rows()]
    monkeypatch.setattr(figures, "rows", lambda: changed)
    assert not figures.up_to_date("ratios")
    assert not figures.up_to_date("scaling")
    assert figures.up_to_date("accuracy")


def test_the_same_numbers_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = []
    for folder in ("one", "two"):
        monkeypatch.setattr(figures, "FOLDER", tmp_path / folder)
        figures.draw("ratios")
        files.append((tmp_path / folder / "ratios.svg").read_bytes())
    assert files[0] == files[1]
    assert len(files[0]) < 60_000


def test_pages_show_every_figure() -> None:
    pages = (ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/methods.md"))
    text = "".join(page.read_text() for page in pages)
    assert [name for name in figures.FIGURES if f"figures/{name}.svg" not in text] == []


def test_tables_are_of_the_committed_results() -> None:
    results, told = shown.measured(), "run: make readme"
    pages = {name: (ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md", "docs/when-not.md")}
    assert section(pages["README.md"], "bench") == update_readme.bench_table(results), told
    assert pages["docs/benchmarks.md"] == update_readme.benchmarks_page(results), told
    assert section(pages["docs/when-not.md"], "slower") == update_readme.slower_table(results), told
