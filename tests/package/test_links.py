"""Every relative link of every Markdown page leads to a file of the repository, and its anchor to a heading."""

import re
from pathlib import Path

import pytest

from testing import ROOT, links

FOLDERS = (".github", "bench", "docs", "emulator", "examples", "scripts", "studies", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
EXAMPLE = """\
# One `heading`, of [two](other.md)

A [link](a.md#one), ![an image](b.png), `no [link](c.md)` and [`code`](d.md).

```
# no heading
[no link](e.md)
```

## Twice
## Twice
"""


def test_code_has_neither_links_nor_headings() -> None:
    assert links.targets(EXAMPLE) == ["other.md", "a.md#one", "b.png", "d.md"]
    assert links.anchors(EXAMPLE) == {"one-heading-of-two", "twice", "twice-1"}
    assert links.slug("1.2 The order of `costs.csv`: A & B") == "12-the-order-of-costscsv-a--b"


def test_there_are_pages_of_every_kind() -> None:
    assert {page.relative_to(ROOT).parts[0] for page in PAGES} >= {"README.md", "CONTRIBUTING.md", "docs", "studies"}
    assert sum(len(links.targets(page.read_text())) for page in PAGES) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    lost = []
    for target in filter(links.is_relative, links.targets(page.read_text())):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not (file.exists() and file.is_relative_to(ROOT)) or (
            anchor and anchor not in links.anchors(file.read_text())
        ):
            lost.append(target)
    assert lost == []


def test_the_site_has_every_page_and_no_other() -> None:
    """`make docs` needs packages that CI lacks; what a new page forgets is told here."""
    listed = re.findall(r"[\w./*-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    added = {*re.findall(r'"([\w./-]+\.md)": ', (ROOT / "scripts" / "documentation.py").read_text())}
    found = {page for name in listed if name not in added for page in (ROOT / "docs").glob(name)}
    assert found == set((ROOT / "docs").rglob("*.md"))
    assert all(name in added or list((ROOT / "docs").glob(name)) for name in listed)
    assert added <= set(listed)
