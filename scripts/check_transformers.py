"""The integration on the supported range of transformers: its tests with the oldest, the newest and versions between.

Each version is installed, with what it needs besides torch, into a folder that comes first on PYTHONPATH: a throw-away
one, or with --keep one that the next run finds again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from testing import ROOT
from testing.process import search_path

from .packages import install_into, newest

# The oldest, two between (5.23 is the last that calls the cache past_key_values), and the newest.
VERSIONS = ("5.3.0", "5.12.1", "5.23.0", "newest")


def supported_below() -> str:
    match = re.search(r'"transformers>=[\d.]+,(<[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    if match is None:
        raise SystemExit("pyproject.toml does not say which transformers are supported")
    return match.group(1)


def kernels_of(folder: Path) -> list[str]:
    """The releases of the hub's kernels that this transformers knows: it imports what is there, and fails on others."""
    table = (folder / "transformers" / "dependency_versions_table.py").read_text()
    return re.findall(r'"kernels": "(kernels[^"]+)"', table)


def check(version: str, arguments: list[str], keep: Path | None) -> tuple[str, str, float]:
    """(transformers and its companions, what pytest said, seconds)."""
    began = time.monotonic()
    throw_away = tempfile.TemporaryDirectory(prefix="tokenprune-transformers-")
    with throw_away if keep is None else nullcontext(str(keep / version)) as folder:
        # with its dependencies: hub and tokenizers of another version do not import
        if not (Path(folder) / "transformers").is_dir():
            try:
                install_into(Path(folder), f"transformers=={version}")
                if wanted := kernels_of(Path(folder)):
                    install_into(Path(folder), "--no-deps", *wanted)
            except RuntimeError as error:
                return version, f"FAILED: {str(error)[-300:]}", time.monotonic() - began
        environment = {**os.environ, "PYTHONPATH": search_path(Path(folder))}
        asked = "import transformers as t, huggingface_hub as h; print(t.__version__, 'hub', h.__version__)"
        named = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment)
        found = named.stdout.strip() or named.stderr.strip()[-300:]
        if found.split(" ")[0] != version:
            return version, f"FAILED: found {found}", time.monotonic() - began
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/transformers", *arguments]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(ran.stdout if ran.returncode else ran.stdout[-2000:], ran.stderr, sep="\n", flush=True)
        last = (ran.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
        told = last if ran.returncode == 0 else f"FAILED: {last}"
    return found, told, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Further arguments reach pytest.")
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="versions to try")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where installed versions stay, one folder each")
    arguments, further = parser.parse_known_args()
    supported = f"transformers{supported_below()}"
    versions = [newest(supported) if version == "newest" else version for version in arguments.versions]
    rows = [check(version, further, arguments.keep) for version in versions]
    width = max(len(found) for found, _, _ in rows)
    print(f"{'transformers':{width}}  seconds  tests")
    for found, told, seconds in rows:
        print(f"{found:{width}}  {seconds:7.0f}  {told}")
    return 1 if any(told.startswith("FAILED") for _, told, _ in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
