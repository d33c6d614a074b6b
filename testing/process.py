"""Python in a process of its own: for what is decided once in a process, what may end it, and what others may start."""

import os
import subprocess
import sys
from pathlib import Path

from . import ROOT


def python(
    *arguments: object, cwd: Path = ROOT, timeout: float = 600, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS`. The variables are set for it in addition; one that is None is not set at all."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )  # fmt: skip


def printed(*arguments: object, cwd: Path = ROOT, timeout: float = 600, **environment: str | None) -> str:
    """What `python ARGUMENTS` prints; an error where it ends in one."""
    done = python(*arguments, cwd=cwd, timeout=timeout, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def search_path(first: Path) -> str:
    """A PYTHONPATH on which a folder comes first."""
    return os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))
