"""The table of caches and modes in docs/transformers.md."""

from pathlib import Path

from testing import ROOT


def test_every_row_of_caches_and_modes_names_tests_that_there_are() -> None:
    section = (ROOT / "docs" / "transformers.md").read_text().split("## Caches and modes")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    here = Path(__file__).parent
    written = "".join(path.read_text() for path in here.glob("test_*.py") if path != Path(__file__))
    assert len(rows) > 15
    for *_, tests in rows:
        for name in tests.strip().split(", "):
            name = name.strip("`")
            assert (here / name).is_file() or f"def {name}(" in written, name
