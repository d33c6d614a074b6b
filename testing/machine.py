"""Where a measurement was made. Nothing here names the machine or its user."""

import os
import platform
import subprocess
from pathlib import Path

from testing import ROOT


def first_lines(words: list[str], count: int = 1, seconds: float = 20) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return "\n".join(lines[-count:]) if lines else None


def commit() -> str:
    """The commit, also in a copy of the working tree without git: the caller may name it in TOKENPRUNE_COMMIT."""
    if named := os.environ.get("TOKENPRUNE_COMMIT"):
        return named
    if (ROOT / ".git").exists() and (head := first_lines(["git", "rev-parse", "--short=12", "HEAD"])):
        return head + (" with changes" if first_lines(["git", "status", "--porcelain"]) else "")
    return "unknown (no git here; set TOKENPRUNE_COMMIT)"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
