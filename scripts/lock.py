"""Write constraints.txt: one release of every package of the development environment, direct and indirect.

`make lock` takes the newest releases within the ranges of pyproject.toml, for every supported Python at once (uv's
universal resolution). torch is left out: the Makefile's variable TORCH says which. What torch itself needs on a CPU is
in; the CUDA libraries of its other builds are pinned by torch.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from testing import ROOT

HEADER = "# Written by `make lock` from the ranges of pyproject.toml. torch is the Makefile's variable TORCH.\n"


def wanted() -> list[str]:
    """Everything that scripts/setup.sh installs besides torch, and what torch asks for wherever it runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    listed = ["pip", *project["build-system"]["requires"], *(line for extra in extras for line in extra)]
    of_torch = [Requirement(line) for line in importlib.metadata.requires("torch") or []]
    listed += [str(r) for r in of_torch if "platform_system" not in str(r.marker) and "extra" not in str(r.marker)]
    return [line for line in listed if Requirement(line).name != "torch"]


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    with tempfile.TemporaryDirectory(prefix="tokenprune-lock-") as folder:
        without_torch = Path(folder, "overrides.txt")
        without_torch.write_text("torch; python_version < '0'\n")
        command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "-", "--universal", "--python-version", oldest]
        command += ["--no-header", "--no-annotate", "--upgrade", "--overrides", str(without_torch)]
        done = subprocess.run(command, input="\n".join(wanted()), stdout=subprocess.PIPE, text=True, check=True)
    (ROOT / "constraints.txt").write_text(HEADER + done.stdout)
    print(f"constraints.txt: {len(done.stdout.splitlines())} lines")


if __name__ == "__main__":
    main()
