"""Everything that is checked and measured on a GPU, in one command: `python -m bench.gpu_suite --out DIR`.

docs/gpu.md says how to run it and how to read its results. It works from a bare checkout: nothing has to be installed
but torch, which is why importing this package makes the references importable.
"""

import importlib.util
import sys

from testing import ROOT

# An installation maps this name to python_ref/; a bare checkout has nothing that does.
REFERENCES, FOLDER = "tokenprune_kernels.reference", ROOT / "python_ref"

if REFERENCES not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        REFERENCES, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[REFERENCES] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[REFERENCES])
