"""What the tests of the demo share: its extras, the command in this process, and checkpoints."""

import importlib.util
from pathlib import Path

import pytest

from tokenprune_kernels.__main__ import EXTRAS, main

NAMES = ("coast", "sts", "adafv", "zspaprune", "adaptprune", "fastv", "divprune", "random")
MISSING = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a call that must end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith("tokenprune")
    return err


def demo(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """stdout of the command with the checkpoint in `folder`; stderr must be its plain progress."""
    capsys.readouterr()
    assert main(["demo", "--model", str(folder), "--repeats", "1", "--max-new-tokens", "3", *arguments]) == 0
    out, err = capsys.readouterr()
    assert all(line.endswith(": answered") for line in err.splitlines()), err
    assert err.startswith("all tokens: answered\n")
    return out
