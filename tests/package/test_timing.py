"""`make timing`: what is copied, what is run, and what it adds up."""

import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import timing
from testing import ROOT


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with sources and what was built from them."""
    root = tmp_path / "checkout"
    for name in ("setup.py", "csrc/a b.cpp", "new.py", "build/x.o", "pkg/_C.abi3.so", ".venv/bin/python"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("build/\n*.so\n.venv/\n")
    monkeypatch.setattr(timing, "ROOT", root)
    return root


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_a_copy_has_what_git_has_or_would_add(checkout: Path, tmp_path: Path) -> None:
    (checkout / "gone.py").touch()
    for command in (["init", "-q"], ["add", "setup.py", "gone.py", "csrc"]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / "gone.py").unlink()
    timing.fresh_copy(tmp_path / "copy")
    assert files(tmp_path / "copy") == {"setup.py", "csrc/a b.cpp", "new.py", ".gitignore"}
    assert (tmp_path / "copy" / "csrc" / "a b.cpp").read_text() == "csrc/a b.cpp"


def test_without_git_a_copy_has_all_that_is_not_built(checkout: Path, tmp_path: Path) -> None:
    timing.fresh_copy(tmp_path / "copy")
    assert files(tmp_path / "copy") == {"setup.py", "csrc/a b.cpp", "new.py", ".gitignore"}


def test_processors_count_what_programs_and_their_kernel_took(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usages = iter([SimpleNamespace(ru_utime=5.0, ru_stime=1.0), SimpleNamespace(ru_utime=7.5, ru_stime=1.25)])
    clocks = iter([100.0, 103.5])
    monkeypatch.setattr(resource, "getrusage", lambda who: next(usages))
    monkeypatch.setattr(time, "monotonic", lambda: next(clocks))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, ""))
    assert timing.timed(["make"], tmp_path) == (3.5, 2.75)


def test_a_part_that_fails_is_shown_with_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no rule\n\nsh -c echo no rule; exit 2 failed"):
        timing.timed(["sh", "-c", "echo no rule; exit 2"], tmp_path)


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *goals: str) -> list[list[str]]:
    """The words of every line, when each part takes 10 seconds of the clock and 15 of the processors."""
    monkeypatch.setattr(timing, "fresh_copy", lambda folder: None)
    monkeypatch.setattr(timing, "timed", lambda command, folder: (10.0, 15.0))
    monkeypatch.setattr(sys, "argv", ["timing", *goals])
    timing.main()
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]


def test_the_parts_are_added_up_beside_the_aim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head, *parts, together = told(monkeypatch, capsys, "demo")
    assert head == ["make", "demo", "seconds", "CPU", "seconds"]
    assert [line[-2:] for line in parts] == [["10", "15"]] * 3
    assert together[:3] == ["together", "30", "45"]
    assert "150" in together
    lines = told(monkeypatch, capsys)
    assert [line[1] for line in lines if line[0] == "make"] == ["demo", "test"]


def test_an_unknown_goal_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="times demo and test, got demo bench"):
        told(monkeypatch, capsys, "demo", "bench")


@pytest.mark.parametrize("goal", list(timing.PARTS))
def test_the_parts_are_those_of_the_makefile(goal: str) -> None:
    """What make would run for a goal from nothing has every part that is no target of its own."""
    command = ["make", "--dry-run", "--always-make", "VENV=.venv", goal]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name, words in timing.PARTS[goal][1]:
        if words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, check=True)
        elif name != "collecting the tests":
            assert shlex.join(words) in planned
