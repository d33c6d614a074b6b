"""Everything that is checked and measured on a GPU, in one command: `python -m bench.gpu_suite --out DIR`.

docs/gpu.md says how to run it and how to read its results. It works from a bare checkout: nothing has to be installed
but torch, which is why importing this package makes the references importable.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from testing import ROOT

REFERENCES = "tokenprune_kernels.reference"


class _References:
    """An installation maps tokenprune_kernels.reference to python_ref/; this does so where there is none."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != REFERENCES:
            return None
        folder = ROOT / "python_ref"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if _References not in sys.meta_path:
    sys.meta_path.append(_References)  # last: an installation is asked first
