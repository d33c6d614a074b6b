"""docs/contract.md: every promise names tests that exist, every op has its section, and what is cited is there."""

import re

import tokenprune_kernels.ops
from testing import ROOT

PAGE = (ROOT / "docs" / "contract.md").read_text()
CITED = re.compile(r"`(test_\w+)`")


def test_every_promise_names_a_test_that_exists() -> None:
    files = (ROOT / "tests").rglob("*.py")
    defined = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert not set(CITED.findall(PAGE)) - defined
    # A promise is an item of a list, which ends at the next item or at an empty line.
    promises = re.findall(r"^\* .*?(?=\n\* |\n\n)", PAGE, re.MULTILINE | re.DOTALL)
    assert len(promises) > 50
    assert not [promise for promise in promises if not CITED.search(promise)]


def test_every_op_has_its_section() -> None:
    assert sorted(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)) == sorted(tokenprune_kernels.ops.__all__)


def test_sections_that_the_code_cites_exist() -> None:
    """The code writes "contract section 1" or "docs/contract.md, section 1.2"."""
    sections = set(re.findall(r"^##+ (\d[\d.]*\d|\d)", PAGE, re.MULTILINE))
    folders = ("tokenprune_kernels", "python_ref", "csrc", "tests")
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.*"))
    sources = (file.read_text() for file in files if file.suffix in (".py", ".h", ".cuh", ".cpp", ".cu"))
    cited = {number for text in sources for number in re.findall(r"contract(?:\.md)?,? section (\d(?:\.\d)?)", text)}
    assert "1" in cited
    assert not cited - sections
