"""CONTRIBUTING.md's lists of files: they exist, and its steps for a new op are all that it takes."""

import re
from pathlib import Path

import pytest

from testing import ROOT, scratch

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (Add .*?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.S | re.M))
# What stands for <op>, <family> and so on where the files are looked for.
EXAMPLES = {"op": "select_topk", "family": "selection", "method": "coast", "model": "llava"}

OP = '''\
"""torch.ops.tokenprune.visible_mean: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import flags, floats, op, scores


@op(values=floats("B N"), mask=flags("B N"), returns=scores("B"))
def visible_mean(values: Tensor, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The mean of each sample's values [B, N] where the mask [B, N] is True; 0 where there is none.

    >>> import torch, tokenprune_kernels as tp
    >>> tp.visible_mean(torch.tensor([[1.0, 3.0, 9.0]]), mask=torch.tensor([[True, True, False]]))
    tensor([2.])
    """
    return call("visible_mean", backend, values, mask=mask)
'''
REFERENCE = '''\
from torch import Tensor

from ._common import ones_like_mask, widen


def visible_mean(values: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The mean of each sample's values where the mask is True, 0 where there is none."""
    mask = ones_like_mask(values, mask)
    return widen(values).masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp_min(1)
'''


def files_of(section: str) -> list[str]:
    return re.findall(r"`([\w./<>-]+/[\w.<>-]+\.\w+)`", SECTIONS[section])


@pytest.mark.parametrize("section", SECTIONS)
def test_the_files_it_names_exist(section: str) -> None:
    named = files_of(section)
    assert named
    for name in named:
        file = re.sub(r"<(\w+)>", lambda m: EXAMPLES[m.group(1)], name)
        # A family of several parts has a file for each, behind the same stem.
        stem, ending = file.rsplit(".", 1)
        assert (ROOT / file).exists() or list(ROOT.glob(f"{stem}_*.{ending}")), f"{section}: {name} (looked for {file})"


def test_there_are_steps_for_whatever_the_package_grows_by() -> None:
    assert list(SECTIONS) == ["Add an op", "Add a kernel for a backend", "Add a method", "Add a model family"]


def test_the_steps_for_an_op_are_all_that_it_takes(tmp_path: Path) -> None:
    """In a copy: four files, and the promises of the contract are tested, through the reference."""
    steps = [step for step in files_of("Add an op") if step.startswith(("python_ref", "tokenprune_kernels"))]
    assert len(steps) == 4
    scratch.checkout(tmp_path)
    ops, references = tmp_path / "tokenprune_kernels" / "ops", tmp_path / "python_ref"
    (ops / "visible_mean.py").write_text(OP)
    (references / "visible_mean.py").write_text(REFERENCE)
    for package in (ops, references):
        exported = 'from .visible_mean import visible_mean\n\n__all__ = [\n    "visible_mean",'
        scratch.edit(package / "__init__.py", (("__all__ = [", exported),))

    files = ["tests/ops", *(f"tests/package/test_{name}.py" for name in ("dispatch", "registry", "doctests"))]
    printed = scratch.pytest(tmp_path, "-k", "visible_mean", *files)
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None
    assert int(passed.group(1)) >= 50, printed[-2000:]
    if "skipped" in printed:
        assert "visible_mean has no cpu kernel yet" in printed
