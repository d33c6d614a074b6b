"""setup.py as a module: it builds nothing when imported."""

import importlib.util
from types import ModuleType

from testing import ROOT


def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tokenprune_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
