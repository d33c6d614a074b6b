"""Every example in a docstring or the README runs, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from types import ModuleType
from typing import Any

import pytest
import torch

import tokenprune_kernels as tp
from testing import ROOT
from testing.docstrings import as_markdown

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _modules() -> list[str]:
    found = ["tokenprune_kernels"]
    for module in pkgutil.walk_packages(tp.__path__, "tokenprune_kernels."):
        last = module.name.rsplit(".", 1)[1]
        if last not in ("_C", "__main__"):
            found.append(module.name)
    reference = pkgutil.iter_modules(tp.reference.__path__, tp.reference.__name__ + ".")
    return sorted({*found, tp.reference.__name__, *(module.name for module in reference)})


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tokenprune_kernels"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")


@pytest.mark.parametrize("name", _modules())
def test_examples_run(name: str) -> None:
    module = _import(name)
    torch.manual_seed(0)
    result = doctest.testmod(module, optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed: see the output"


def test_examples_of_the_readme_run() -> None:
    """The one that prunes a vision-language model runs on a small random one."""
    from tests.transformers.vlm.models import llava

    prompts = llava()
    names: dict[str, Any] = {"model": prompts.model, "inputs": prompts.inputs}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(example, names)
    assert names["kept"].shape == (1, 910, 3584)
    assert names["pruning"].stats["prefills"] == 1
    assert names["out"].shape[1] > prompts.inputs["input_ids"].shape[1]


@pytest.mark.parametrize("page", ["methods.md", "when-not.md"])
def test_examples_of_pages_run(page: str) -> None:
    """They may stand in a list, hence indented."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(textwrap.dedent(example), {})


PUBLIC = [f"tokenprune_kernels.{name}" for name in tp.__all__ if inspect.isfunction(getattr(tp, name))] + [
    f"{module.__name__}.{name}"
    for module in (tp.methods, tp.varlen)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
]


@pytest.mark.parametrize("qualified", PUBLIC)
def test_every_public_function_has_a_docstring_with_an_example(qualified: str) -> None:
    module, name = qualified.rsplit(".", 1)
    text = inspect.getdoc(getattr(importlib.import_module(module), name))
    assert text, f"{qualified} has no docstring"
    assert doctest.DocTestParser().get_examples(text), f"{qualified} has no example"


@pytest.mark.parametrize("name", tp.reference.__all__)
def test_every_reference_says_what_it_computes(name: str) -> None:
    assert inspect.getdoc(getattr(tp.reference, name))


def test_all_names_everything_public() -> None:
    public = {n for n, v in vars(tp).items() if not n.startswith("_") and not isinstance(v, ModuleType)}
    assert public | {"__version__", "methods", "reference", "varlen"} == set(tp.__all__)


@pytest.mark.parametrize("qualified", PUBLIC)
def test_the_site_shows_sections_and_examples(qualified: str) -> None:
    """What testing/docstrings.py makes of a docstring: lists of arguments, and examples in blocks of code."""
    module, name = qualified.rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    shown = as_markdown(inspect.getdoc(function) or "", inspect.signature(function).parameters)
    blocks = re.findall(r"^```pycon\n(.*?)^```$", shown, re.MULTILINE | re.DOTALL)
    assert sum(block.count(">>>") for block in blocks) == shown.count(">>>") > 0
    assert not re.search(r"^(Args|Returns|Raises|Examples?):", shown, re.MULTILINE)
    listed = re.search(r"^\*\*Args\*\*\n\n(.*?)\n\n", shown, re.MULTILINE | re.DOTALL)
    if listed:
        entries = re.findall(r"^- ((?:`\w+`(?:, )?)+):", listed[1], re.MULTILINE)
        assert {word for entry in entries for word in re.findall(r"\w+", entry)} <= set(
            inspect.signature(function).parameters
        )
        assert len(entries) == len(re.findall(r"^\S", listed[1], re.MULTILINE))
