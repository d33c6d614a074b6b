"""The CUDA kernels on the host: see README.md in this folder. `load()` builds the emulator and imports it."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from . import build

_LIBRARIES: list[Any] = []  # registrations live as long as their library


def _imported(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load() -> ModuleType:
    """The extension module `_emulator`; importing it defines torch.ops.tokenprune_emulated."""
    import torch  # noqa: F401  (its libraries have to be in the process)

    return _imported("_emulator", build.build())


@functools.cache
def ops() -> Any:
    """The emulated kernels as a namespace of ops: only gather_compact has a gradient."""
    import torch

    from tokenprune_kernels import _autograd
    from tokenprune_kernels._op import compiled_ops

    load()
    library = torch.library.Library("tokenprune_emulated", "FRAGMENT")
    _autograd.register(library, torch.ops.tokenprune_emulated, compiled_ops())
    _LIBRARIES.append(library)
    return torch.ops.tokenprune_emulated


@functools.cache
def load_broken() -> ModuleType:
    """The extension module `_broken`: kernels with mistakes, for the tests of the emulator."""
    return _imported("_broken", build.build_broken())
