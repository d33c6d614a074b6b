"""A copy of the checkout that a test may change, to see what a change takes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from . import ROOT

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
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": paths, "TOKENPRUNE_TEST_BACKENDS": "cpu,reference"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    return done.stdout


def pytest(root: Path, *arguments: str) -> str:
    return run(root, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
