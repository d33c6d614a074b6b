"""The build backend: which torch a build is against, and when it has to be fetched."""

import importlib.util
import runpy
import site
from pathlib import Path
from typing import Any

import pytest

from testing import ROOT
from testing.setup_file import setup_module

BACKEND = ROOT / "scripts" / "build_backend" / "tokenprune_build.py"


def packages(prefix: Path, version: str | None) -> Path:
    """The packages of an environment with this torch."""
    folder = Path(site.getsitepackages([str(prefix)])[0])
    (folder / "torch").mkdir(parents=True)
    if version is not None:
        (folder / "torch" / "__init__.py").touch()
        (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    return folder


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The prefix of an environment without packages; imports find no torch, as in an isolated build."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    monkeypatch.setattr(site, "PREFIXES", [str(tmp_path / "environment")])
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("TOKENPRUNE_CPU", "1")
    return tmp_path / "environment"


def asked_for() -> dict[str, list[str]]:
    """What the build needs besides the tools, by the kind of build."""
    backend: dict[str, Any] = runpy.run_path(str(BACKEND))
    return {kind: backend[f"get_requires_for_build_{kind}"]() for kind in ("wheel", "editable", "sdist")}


def test_the_torch_of_the_environment_serves_an_isolated_build(isolated: Path) -> None:
    folder = packages(isolated, "2.10.1+cu130")
    assert asked_for() == {"wheel": [], "editable": [], "sdist": []}
    assert setup_module().torch_folder() == folder / "torch"


def test_so_does_that_of_an_activated_environment(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip can isolate by a virtual environment, whose interpreter knows nothing of the other one."""
    folder = packages(isolated.with_name("activated"), "3.0.0")
    monkeypatch.setenv("VIRTUAL_ENV", str(isolated.with_name("activated")))
    assert asked_for()["wheel"] == []
    assert setup_module().torch_folder() == folder / "torch"


@pytest.mark.parametrize(("version", "found"), [("2.9.1", "2.9.1"), (None, "none")])
def test_torch_is_fetched_where_none_serves(isolated: Path, version: str | None, found: str) -> None:
    """A folder that is left of a torch, without its files, is none."""
    packages(isolated, version)
    assert asked_for() == {"wheel": ["torch>=2.10"], "editable": ["torch>=2.10"], "sdist": []}
    with pytest.raises(SystemExit, match=rf"needs torch >= 2\.10 in this environment, found {found}: "):
        setup_module().torch_folder()


@pytest.mark.parametrize("switches", [{"TOKENPRUNE_CPU": "0"}, {"TOKENPRUNE_CPU": "auto", "CXX": "/nonexistent/g++"}])
def test_a_build_without_compiled_code_needs_none(
    isolated: Path, monkeypatch: pytest.MonkeyPatch, switches: dict[str, str]
) -> None:
    packages(isolated, None)
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    assert asked_for() == {"wheel": [], "editable": [], "sdist": []}


def test_the_floor_is_that_of_the_package() -> None:
    assert f'dependencies = ["torch>={setup_module().TORCH_FLOOR}"]' in (ROOT / "pyproject.toml").read_text()
