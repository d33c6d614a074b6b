"""The CUDA kernels on the host: see README.md in this folder. `load()` builds the emulator and imports it."""

import functools
import importlib.util
from types import ModuleType

from . import build


@functools.cache
def load() -> ModuleType:
    """The extension module `_emulator`; importing it defines torch.ops.tokenprune_emulated."""
    import torch  # noqa: F401  (its libraries have to be in the process)

    spec = importlib.util.spec_from_file_location("_emulator", build.build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
