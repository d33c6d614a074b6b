"""The notebooks of examples/: their code runs from top to bottom, and they are committed without outputs.

There is no Jupyter in the environment of the tests: the code cells run one after the other in a process of their own,
so that what a front end adds, the display of a cell's last value, is not covered.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from testing import ROOT
from testing.process import printed, search_path

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
# What each one prints, in this order.
SAYS = {
    "own_method.ipynb": ("features", "Correct is 14", "outliers: 128 of 576", "outliers_by_ops: 128 of 576"),
    "prune_a_vlm.ipynb": ("all tokens: 14", "coast: ", "'before': [576], 'after': [128]", "divprune", "random"),
}


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.name)
def test_the_code_runs(notebook: Path) -> None:
    for module in ("transformers", "PIL"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    code = "\n\n".join("".join(cell["source"]) for cell in cells(notebook, "code"))
    told = printed("-c", code, cwd=notebook.parent, PYTHONPATH=search_path(ROOT))
    for words in SAYS[notebook.name]:
        assert words in told
        told = told[told.index(words) :]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.name)
def test_nothing_of_a_run_is_committed(notebook: Path) -> None:
    content = json.loads(notebook.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(notebook, "code"))
    assert cells(notebook, "markdown")


def test_there_is_one_for_each_door_of_the_readme() -> None:
    assert [notebook.name for notebook in NOTEBOOKS] == list(SAYS)
    readme = (ROOT / "README.md").read_text()
    assert all(f"(examples/notebooks/{name})" in readme for name in SAYS)
