"""The build backend: that of setuptools, which also needs torch only where none is installed.

pip builds in isolation from the environment that it installs into, and would fetch a torch of its own for the headers
alone. On the stable ABI any torch serves, so that setup.py takes the one of the environment, which isolation hides from
imports but leaves in its folder. Only where that has none, or too old a one, is torch a requirement of the build, and
never of a build without compiled code.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


def torch_to_fetch() -> list[str]:
    """torch as a requirement of the build, if it is one."""
    setup = runpy.run_path(str(SETUP), run_name="setup")
    torch = setup["installed_torch"]()
    needed = setup["wants_binary"]() and (torch is None or not setup["new_enough"](torch))
    return [f"torch>={setup['TORCH_FLOOR']}"] if needed else []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_to_fetch()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_to_fetch()]
