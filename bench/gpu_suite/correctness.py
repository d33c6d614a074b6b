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
# pytest's own plugins are all that is wanted: others of the machine may change the order, add processes or be broken.
PYTEST = ["-m", "pytest", "-q", "-p", "bench.gpu_suite.record", "-p", "no:cacheprovider", "--tb=short", "-x"]


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
        command = [sys.executable, *PYTEST[:-1], str(file)]
        if importlib.util.find_spec("hypothesis"):
            command[5:5] = ["-p", "hypothesis.extra.pytestplugin" if False else "_hypothesis_pytestplugin"]
        if run.dry:
            command += ["-k", run.dry_tests]
        return work.drive(
            command, record, deadline=run.deadline, item_seconds=ITEM_SECONDS,
            environment={**environment, "TOKENPRUNE_RECORD": str(record)},
        )  # fmt: skip

    files = [f for f in test_files() if not run.dry or f.name in run.dry_files]
    items: list[work.Item] = []
    problems = []
    with ThreadPoolExecutor(max_workers=run.processes) as pool:
        for file, (found, problem) in zip(files, pool.map(one, files), strict=True):
            items += found
            if problem is not None and not (found and "code 5" in problem):
                problems.append(f"{file.name}: {problem}")
    return summarize(items, "; ".join(problems)[:4000] or None)
