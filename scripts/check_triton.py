"""The Triton kernels under every supported release of Triton: interpreted on the CPU, and compiled ahead of time.

Triton alone is exchanged (for 3.6 numpy too): `pip install --no-deps --target` puts a release into a throw-away folder
that goes first on PYTHONPATH, and everything else is this environment, torch included. What this does not check is a
release together with the torch it was made for (the table below says which), and no kernel runs on a GPU.

Without --all it runs the tests that compare every op with its reference, those on matrix units that truncate, and
compiles one specialisation of every kernel per element type and target: a release takes minutes, not an hour.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from testing import ROOT
from testing.process import search_path

from .packages import install_into

# Release of Triton: the torch that asks for it.
PAIRS = {"3.6.0": "2.10, 2.11", "3.7.0": "2.12", "3.7.1": "2.13", "3.8.0": "2.14", "3.9.0": "2.15"}
# The interpreter of 3.6 makes numbers of arrays with one element, which numpy 2.4 refuses.
BESIDE = {"3.6.0": ["numpy<2.4"]}
QUICK = "triton and (agrees_with_the_reference or test_runtime or test_products)"
VERSION = "import triton, importlib.metadata as m; print(triton.__version__, m.version('triton'), triton.__file__)"


class Outcome(NamedTuple):
    good: bool
    said: str
    seconds: float


def timed(command: list[str], environment: dict[str, str], last_line: str) -> Outcome:
    """Run, print what is printed, and keep the last line that contains `last_line`."""
    began = time.monotonic()
    said = ""
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"    {line}", end="", flush=True)
            said = line.strip(" =\n") if last_line in line else said
    return Outcome(process.returncode == 0, said or f"exit status {process.returncode}", time.monotonic() - began)


def check(version: str, folder: Path, chosen: str, compiled: list[str]) -> dict[str, Outcome]:
    try:
        install_into(folder, "--no-deps", f"triton=={version}", *BESIDE.get(version, []))
    except RuntimeError as error:
        return {"installed": Outcome(False, str(error)[-300:], 0.0)}
    environment = {**os.environ, "PYTHONPATH": search_path(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    told = subprocess.run(
        [sys.executable, "-c", VERSION], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    if told[:2] != [version, version] or not told[2].startswith(str(folder)):
        return {"installed": Outcome(False, f"python finds triton {' '.join(told)}", 0.0)}
    tests = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    tests += ["--ignore", "tests/triton/test_compile.py", "-k", chosen, "tests"]
    only = {**environment, "TOKENPRUNE_TEST_BACKENDS": "triton,cpu,reference"}
    return {
        "interpreted": timed(tests, only, " in "),
        "compiled": timed([sys.executable, "-m", "testing.triton_compile", *compiled], environment, "triton: "),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("triton", nargs="*", default=list(PAIRS), help="releases to try")
    parser.add_argument("-k", dest="chosen", default=QUICK, help="the tests to run, as pytest -k takes it")
    parser.add_argument("--all", action="store_true", help="all tests of backend triton, and every specialisation")
    arguments = parser.parse_args()
    chosen, compiled = ("triton", []) if arguments.all else (arguments.chosen, ["--sample"])
    table: list[tuple[str, str, Outcome]] = []
    for version in arguments.triton:
        print(f"triton {version} (torch {PAIRS.get(version, 'unknown')})", flush=True)
        with tempfile.TemporaryDirectory(prefix="tokenprune-triton-") as folder:
            for step, outcome in check(version, Path(folder), chosen, compiled).items():
                table.append((version, step, outcome))
    print(f"\n{'triton':<8}{'made for torch':<16}{'step':<13}{'':<8}{'seconds':>8}  result")
    for version, step, outcome in table:
        word = "ok" if outcome.good else "FAILED"
        print(f"{version:<8}{PAIRS.get(version, ''):<16}{step:<13}{word:<8}{outcome.seconds:>8.0f}  {outcome.said}")
    return 0 if all(outcome.good for *_, outcome in table) else 1


if __name__ == "__main__":
    raise SystemExit(main())
