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
    assert names["selection"].counts.tolist() == [910]
    assert names["pruning"].stats["prefills"] == 1
    assert names["out"].shape[1] > prompts.inputs["input_ids"].shape[1]


def test_examples_of_when_not_to_use_us_run() -> None:
    """They stand in a list, hence indented."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "when-not.md").read_text(), re.DOTALL)
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
