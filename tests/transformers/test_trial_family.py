"""A model family that is added to the package in two files is served, in the table of the docs, and pruned."""

import re
from pathlib import Path

import pytest

from testing import scratch

ADAPTER = '''"""A family that came later: one image, its tokens side by side."""

from ..families import Family, Inputs, Model
from ..layout import Layout, grid_patches, layout_of


def layout(core: Model, inputs: Inputs, counts: list[int]) -> Layout:
    return layout_of([[grid_patches(1, count, 0)] for count in counts], max(counts))


FAMILIES = (Family("Trial", ("trial",), layout=layout, grid="one row", saliency=None),)
'''
USE = """
import torch
from testing import ROOT, family_table
from testing.pages import fill
from tests.transformers.vlm.models import llava
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

page = ROOT / "docs" / "transformers.md"
page.write_text(fill(page.read_text(), "families", family_table.families()))
prompts = llava(2, ragged=True)
prompts.model.config.model_type = "trial"
for method in ("coast", "sts", "adaptprune"):
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, 9) as pruning:
        prompts.model(**prompts.inputs)
    print(pruning.stats["after"], pruning.boxes().shape[0])
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with one more family."""
    root = scratch.checkout(tmp_path_factory.mktemp("checkout"))
    folder = root / "tokenprune_kernels" / "integrations" / "transformers"
    (folder / "adapters" / "trial.py").write_text(ADAPTER)
    scratch.edit(
        folder / "registry.py",
        (
            ("from .adapters import (\n", "from .adapters import (\n    trial,\n"),
            ("_ADAPTERS = (\n", "_ADAPTERS = (\n    trial,\n"),
        ),
    )
    return root


def test_two_files_and_the_table_of_the_docs_are_all_that_a_family_takes(copy: Path) -> None:
    assert scratch.run(copy, "-c", USE).splitlines() == ["[9, 9] 9"] * 3
    assert (
        "\n| `trial` | `image_token_id` | one row | none | full attention |\n"
        in (copy / "docs" / "transformers.md").read_text()
    )
    found = scratch.pytest(copy, "tests/transformers/test_families.py", "-k", "table or circle")
    assert re.search(r"3 passed|2 passed, 1 skipped", found), found  # the page is of newer versions
