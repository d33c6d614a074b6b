"""Garbage in: whatever an op is called with, it returns or raises one of five errors, and the next good call works.

The calls are those of fuzz.py, each made from one number, in processes of their own: one that crashes or never returns
is a failing test, which names the number. TOKENPRUNE_FUZZ_CALLS is how many there are (`make sanitize`: 100,000).
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from testing.op_samples import OPS
from testing.process import python

CALLS = int(os.environ.get("TOKENPRUNE_FUZZ_CALLS", "5000"))
IN_A_PROCESS = 5000


@pytest.mark.parametrize("first", range(0, CALLS, IN_A_PROCESS))
def test_malformed_calls_return_or_raise(first: int, tmp_path: Path) -> None:
    count = min(IN_A_PROCESS, CALLS - first)
    run = python(
        "-m", "tests.ops.fuzz", first, count, tmp_path / "number", timeout=3600, OMP_NUM_THREADS="2"
    )  # fmt: skip
    if run.returncode:
        number = (tmp_path / "number").read_text().strip()
        pytest.fail(f"exit status {run.returncode} at `python -m tests.ops.fuzz {number} 1`:\n{run.stderr[-4000:]}")
    returned = Counter(json.loads(run.stdout))
    assert set(returned) == set(OPS)
    assert min(returned.values()) > count // len(OPS) // 16, f"hardly any call got past the checks: {returned}"
