"""How long `make demo` and `make test` take from nothing, part by part: `make timing`.

Each starts from a fresh copy of this checkout with a fresh environment, as on a new machine; pip's cache stays, because
a network is no property of this project. `make test` ends here where its first test would run. CPU seconds stand
beside the clock's, because other programs on the machine stretch only the latter.

usage: python3 scripts/timing.py [demo] [test]     (needs no environment; PYTHON and TORCH as make takes them)
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ".venv/bin/python"
COMPILE = ("the library", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"])
# (aim in seconds on two cores, parts)
PARTS = {
    "demo": (150, [("the environment", ["make", ".venv/.demo"]), COMPILE, ("the demo", ["make", "demo"])]),
    "test": (300, [
        ("the environment", ["make", ".venv/.installed"]), COMPILE, ("the emulator", [PYTHON, "-m", "emulator"]),
        ("collecting the tests", [PYTHON, "-m", "pytest", "-q", "--collect-only"]),
    ]),
}  # fmt: skip


def fresh_copy(folder: Path) -> None:
    """The files that git has or would add; without git, all that are not built."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") and (ROOT / ".git").exists():
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
    else:
        built = shutil.ignore_patterns(".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=built, symlinks=True, dirs_exist_ok=True)


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processors; what the command prints is shown only when it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    clock, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\n{' '.join(command)} failed")
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    goals = sys.argv[1:] or [*PARTS]
    if not {*goals} <= {*PARTS}:
        raise SystemExit(f"scripts/timing.py times {' and '.join(PARTS)}, got {' '.join(goals)}")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{cores} cores, {load:.1f} programs running on them before this began")
    for goal in goals:
        aim, parts = PARTS[goal]
        print(f"make {goal:22}{'seconds':>10}{'CPU seconds':>14}", flush=True)
        clocks, cpus = 0.0, 0.0
        with tempfile.TemporaryDirectory(prefix="tokenprune timing ") as folder:
            fresh_copy(Path(folder))
            for name, command in parts:
                clock, cpu = timed(command, Path(folder))
                clocks, cpus = clocks + clock, cpus + cpu
                print(f"  {name:25}{clock:10.0f}{cpu:14.0f}", flush=True)
        print(f"  {'together':25}{clocks:10.0f}{cpus:14.0f}   (aim: {aim} s on two quiet cores)", flush=True)


if __name__ == "__main__":
    main()
