"""A model family that is added to the package in two files is served, in the table of the docs, and pruned."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testing import ROOT

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
    root = tmp_path_factory.mktemp("checkout")
    for name in ("tokenprune_kernels", "python_ref", "testing", "tests", "emulator", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "build", "reference", "*.so")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for library in (ROOT / "tokenprune_kernels").glob("*.so"):
        (root / "tokenprune_kernels" / library.name).symlink_to(library)
    (root / "tokenprune_kernels" / "reference").symlink_to(root / "python_ref")  # what an installation maps
    shutil.copy(ROOT / "pyproject.toml", root)
    folder = root / "tokenprune_kernels" / "integrations" / "transformers"
    (folder / "adapters" / "trial.py").write_text(ADAPTER)
    text = (folder / "registry.py").read_text()
    for old, new in ((", qwen_vl\n", ", qwen_vl, trial\n"), (", internvl):", ", internvl, trial):")):
        assert text.count(old) == 1, f"{old!r} is not once in registry.py"
        text = text.replace(old, new)
    (folder / "registry.py").write_text(text)
    return root


def test_two_files_and_the_table_of_the_docs_are_all_that_a_family_takes(copy: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=copy, capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")]))},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert run("-c", USE).splitlines() == ["[9, 9] 9"] * 3
    assert (
        "\n| `trial` | `image_token_id` | one row | none | full attention |\n"
        in (copy / "docs" / "transformers.md").read_text()
    )
    found = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/transformers/test_families.py",
                "-k", "table or circle")  # fmt: skip
    assert "3 passed" in found
