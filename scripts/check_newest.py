"""The newest releases of what moves: install them whatever the ranges of pyproject.toml say, and run what touches them.

Runs inside the environment that `make check-newest` makes without constraints. A release outside a range that passes
here is a reason to widen the range; one that fails is found before a fresh machine finds it.
"""

import importlib.metadata
import re
import subprocess
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from testing import ROOT

from .packages import pip

# The integration, Triton, packaging, and the pages that users follow.
TESTS = (
    "tests/transformers", "tests/triton", "tests/demo", "tests/package/test_build.py", "tests/package/test_binary.py",
    "tests/package/test_registry.py", "tests/package/test_examples.py", "tests/package/test_doctests.py",
)  # fmt: skip


def bounded() -> list[Requirement]:
    """What this checkout holds below a version, as far as it is here; torch apart: the Makefile's TORCH says which."""
    here = {canonicalize_name(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    listed = (Requirement(line) for line in importlib.metadata.requires("tokenprune_kernels") or [])
    found = {r.name: r for r in listed if re.search("<", str(r.specifier)) and r.name != "torch"}
    return [found[name] for name in sorted(found) if canonicalize_name(name) in here]


def main() -> int:
    ranges = bounded()
    pip("install", "--upgrade", "--upgrade-strategy", "eager", *(r.name for r in ranges))
    print(f"{'package':24}{'newest':14}{'range of pyproject.toml':28}")
    for requirement in ranges:
        version = importlib.metadata.version(requirement.name)
        inside = requirement.specifier.contains(version, prereleases=True)
        print(f"{requirement.name:24}{version:14}{requirement.specifier!s:28}{'' if inside else 'OUTSIDE'}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
