"""constraints.txt: complete for the development environment, and within the ranges of pyproject.toml."""

import importlib.metadata
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from testing import ROOT

CONSTRAINTS = ROOT / "constraints.txt"

if not CONSTRAINTS.exists():
    pytest.skip("no constraints.txt beside these tests: they run from an installation", allow_module_level=True)


def pins() -> dict[str, str]:
    """The release of every package for this Python on this system."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    assert all(re.fullmatch(r"==[\w.+!]+", str(r.specifier)) for r in wanted), "a constraint that is no pin"
    found = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in wanted}
    assert len(found) == len(wanted), "two pins of one package"
    return found


def needed() -> dict[str, list[Requirement]]:
    """What the extras of the Makefile's environment ask for, and what that asks for, as far as it is installed."""
    extras = re.search(r"extras=.*:-(.+)}", (ROOT / "scripts" / "setup.sh").read_text())
    assert extras is not None
    waiting = [("tokenprune-kernels", tuple(extras.group(1).split(",")))]
    found: dict[str, list[Requirement]] = {}
    done = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in done:
            continue
        done.add((name, wanted))
        try:
            listed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, listed):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                child = canonicalize_name(requirement.name)
                found.setdefault(child, []).append(requirement)
                waiting.append((child, tuple(sorted(requirement.extras))))
    return found


def test_everything_but_torch_and_what_its_cuda_builds_bring_is_pinned() -> None:
    of_torch = {canonicalize_name(Requirement(r).name) for r in importlib.metadata.requires("torch") or []}
    brought = {name for name in of_torch if name.startswith(("nvidia-", "cuda-"))} | {"torch"}
    assert "transformers" in needed(), "the extras were not found"
    assert set(needed()) - set(pins()) - brought == set()


def test_pins_lie_within_the_ranges() -> None:
    for name, requirements in needed().items():
        for requirement in requirements:
            if name in pins():
                assert requirement.specifier.contains(pins()[name], prereleases=True), f"{requirement}: {pins()[name]}"


def test_torch_is_not_pinned_here() -> None:
    assert "torch" not in pins()
