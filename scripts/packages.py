"""pip, as the checks of other releases use it."""

import json
import os
import subprocess
import sys
from pathlib import Path


def pip(*arguments: object, python: str = sys.executable, **environment: str) -> str:
    """What pip prints; RuntimeError with what it complains of where it fails."""
    words = [str(argument) for argument in arguments]
    command = [python, "-m", "pip", *words, "-q", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(words)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def newest(requirement: str) -> str:
    """The version that pip would install for "torch" or "transformers<5.25"; it fetches metadata alone."""
    whole = ("--ignore-installed", "--no-deps", "--only-binary=:all:")
    told = pip("install", "--dry-run", *whole, "--report=-", requirement)
    return str(json.loads(told)["install"][0]["metadata"]["version"])


def install_into(folder: Path, *arguments: str) -> None:
    """Installs into a folder that stands on no search path yet."""
    pip("install", "--no-cache-dir", "--target", folder, *arguments)
