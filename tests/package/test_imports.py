"""Imports point one way: no circle among modules, and the package knows nothing of what stands around it."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from testing import ROOT

PACKAGE, SHARED, EMULATOR = "tokenprune_kernels", "testing", "emulator"
# A folder of the root, and what its modules may import besides the folder itself and packages from elsewhere.
ALLOWED = {
    PACKAGE: set(),
    EMULATOR: {PACKAGE},
    SHARED: {PACKAGE, EMULATOR},
    "bench": {PACKAGE, EMULATOR, SHARED},
    "studies": {PACKAGE, SHARED},
    "scripts": {PACKAGE, SHARED, "bench", "studies"},  # the pages that show what both have measured
    "examples": {PACKAGE},
    "tests": {PACKAGE, SHARED, EMULATOR, "bench", "studies", "scripts"},
}


def sources() -> dict[str, Path]:
    """The files of all modules; python_ref is installed as tokenprune_kernels.reference."""
    found = {}
    for folder in (*ALLOWED, "python_ref"):
        for file in (ROOT / folder).rglob("*.py"):
            parts = list(file.relative_to(ROOT).with_suffix("").parts)
            if parts[0] == "python_ref":
                parts[:1] = [PACKAGE, "reference"]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = file
    return found


SOURCES = sources()


def statements(body: list[ast.stmt], late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a block; those inside functions only if asked for: they run when the module is there."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not late:
            continue
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            for block in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, block, []), late)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, late)


def imported(module: str, late: bool = False) -> Iterator[str]:
    """The modules of this repository that a module imports by name."""
    file = SOURCES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in statements(ast.parse(file.read_text()).body, late):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name` takes a module of that name, or what the package's own file defines.
            names = [n if (n := f"{base}.{alias.name}") in SOURCES else base for alias in node.names]
        yield from (name for name in names if name in SOURCES and name != module)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: set(imported(module)) for module in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_towards_the_package(folder: str) -> None:
    """Those inside functions count here too."""
    reached = {
        f"{module} imports {name}"
        for module in SOURCES
        if module.partition(".")[0] == folder
        for name in imported(module, late=True)
        if name.partition(".")[0] not in ALLOWED[folder] | {folder}
    }
    assert reached == set()


def test_every_folder_with_modules_is_known() -> None:
    with_modules = {file.parent.name for file in ROOT.glob("*/*.py")}
    assert with_modules - {"build", "dist", ".venv"} == {*ALLOWED, "python_ref"}


def test_nothing_edits_the_search_path() -> None:
    """Modules of the root are imported from the root: `python -m folder.module`, and pytest's pythonpath."""
    edit = re.compile(r"sys\.path(\.|\[|\s*\+?=[^=])")
    assert [module for module, file in SOURCES.items() if edit.search(file.read_text())] == []


def test_all_kinds_of_imports_are_seen() -> None:
    """Imports of a module, of a name in it, relative ones, and those inside functions."""
    assert "testing.op_samples" in imported("tests.ops.test_contract")
    assert "tests.ops.test_contract" in imported("tests.ops.test_boundary")
    assert "bench.gpu_suite.work" in imported("bench.gpu_suite.build")
    assert EMULATOR in imported("tests.cuda.conftest")
    assert EMULATOR not in imported("testing.cases")
    assert EMULATOR in imported("testing.cases", late=True)
