"""The tests of backend "gpu", a process per test file; without pytest, the samples of every op against the reference."""

import importlib.util
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import ROOT, work
from .run import Run, summarize

ITEM_SECONDS = 60.0
# What a dry run takes: enough to go through the plugin, the backend and tests/test_gpu.py.
DRY_FILES, DRY_TESTS = ("test_contract.py", "test_gpu.py"), "score_entropy and (float32 or test_gpu)"
# Only our plugin: others that the machine happens to have may reorder tests, add processes, or be broken.
PYTEST = ["-m", "pytest", "-q", "--tb=short", "-p", "bench.gpu_suite.record", "-p", "no:cacheprovider"]
PYTEST_RAN = (0, 1, 5)  # all passed, some failed, nothing left to run


def test_files() -> list[Path]:
    """The files with tests over backends, the longest first, and tests/test_gpu.py."""
    chosen = []
    for file in sorted((ROOT / "tests").glob("test_*.py"), key=lambda f: -f.stat().st_size):
        if file.name == "test_gpu.py" or re.search(r"\bover_backends\b|\bBACKENDS\b", file.read_text()):
            chosen.append(file)
    return chosen


def missing_modules() -> list[str]:
    return [name for name in ("pytest", "numpy") if importlib.util.find_spec(name) is None]


def run(run: Run) -> dict[str, Any]:
    lacking = missing_modules()
    if lacking:
        items, problem = run.worker("samples", item_seconds=ITEM_SECONDS)
        summary = summarize(items, problem)
        summary["summary"]["note"] = f"not installed: {', '.join(lacking)}; the samples of every op ran without pytest"
        return summary
    environment = {
        "TOKENPRUNE_TEST_BACKENDS": "gpu",
        "TOKENPRUNE_POISON": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }

    def one(file: Path) -> tuple[list[work.Item], str | None]:
        record = run.out / "records" / f"{file.stem}.jsonl"
        command = [sys.executable, *PYTEST, str(file), *(["-k", DRY_TESTS] if run.dry else [])]
        return work.drive(
            command, record, deadline=run.deadline, item_seconds=ITEM_SECONDS, good_codes=PYTEST_RAN,
            environment={**environment, "TOKENPRUNE_RECORD": str(record)},
        )  # fmt: skip

    files = [f for f in test_files() if not run.dry or f.name in DRY_FILES]
    items: list[work.Item] = []
    problems = []
    with ThreadPoolExecutor(max_workers=run.processes) as pool:
        for file, (found, problem) in zip(files, pool.map(one, files), strict=True):
            items += found
            if problem is not None:
                problems.append(f"{file.name}: {problem}")
    return summarize(items, "; ".join(problems)[:4000] or None)
