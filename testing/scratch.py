"""A copy of the checkout that a test may change, to see what a change takes."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from . import ROOT
from .process import printed, search_path

FOLDERS = ("tokenprune_kernels", "python_ref", "testing", "emulator", "tests", "bench", "studies", "docs")


def checkout(root: Path) -> Path:
    """Copies what the tests need to `root`, without the weights and what was built, but for the compiled library."""
    ignored = shutil.ignore_patterns("__pycache__", "build", "models", "reference", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    package = root / "tokenprune_kernels"
    for library in (ROOT / "tokenprune_kernels").glob("*.so"):
        (package / library.name).symlink_to(library)
    (package / "reference").symlink_to(root / "python_ref")  # what an installation maps
    return root


def edit(file: Path, replacements: Iterable[tuple[str, str]]) -> None:
    """Replaces texts that are in the file once."""
    text = file.read_text()
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} is not once in {file}"
        text = text.replace(old, new)
    file.write_text(text)


def run(root: Path, *arguments: str) -> str:
    """What Python prints in the copy, on backends that need no build."""
    return printed(*arguments, cwd=root, PYTHONPATH=search_path(root), TOKENPRUNE_TEST_BACKENDS="cpu,reference")


def pytest(root: Path, *arguments: str) -> str:
    return run(root, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
