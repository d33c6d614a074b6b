"""pip as the checks of other releases use it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import packages


def test_a_failure_says_what_was_asked_and_what_pip_complains_of(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)pip install --no-index --target \S+ nothing failed: .*No matching"):
        packages.pip("install", "--no-index", "--target", tmp_path, "nothing")


def test_variables_reach_pip() -> None:
    with pytest.raises(RuntimeError, match=r"/nonexistent/pins\.txt"):
        packages.pip("install", "--no-index", "--dry-run", "nothing", PIP_CONSTRAINT="/nonexistent/pins.txt")


def test_the_newest_release_is_what_pip_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        report = {"version": "1", "install": [{"metadata": {"name": "torch", "version": "2.14.1"}}]}
        return subprocess.CompletedProcess(command, 0, json.dumps(report), "")

    monkeypatch.setattr(subprocess, "run", run)
    assert packages.newest("torch<2.15") == "2.14.1"
    assert "--dry-run" in asked[0]
    assert "torch<2.15" in asked[0]
