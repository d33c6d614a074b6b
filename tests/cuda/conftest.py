"""The emulator's kernels with mistakes, for the tests of the emulator itself."""

import os
import shutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import emulator


@pytest.fixture
def broken() -> Iterator[ModuleType]:
    """The extension module, with the settings that it starts with."""
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("no C++ compiler")
    module = emulator.load_broken()
    module.settings().reset()
    yield module
    module.settings().reset()
