"""The tests of backend "gpu" or "triton", a process per test file; without pytest, the samples of every op."""

import importlib.util
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from testing import ROOT

from . import work
from .run import Run, summarize

ITEM_SECONDS = 90.0
TESTS = ROOT / "tests"
CONTRACT, ON_GPU = TESTS / "ops" / "test_contract.py", TESTS / "cuda" / "test_gpu.py"
# The files over all ops are shared between processes.
SHARED = (CONTRACT, TESTS / "ops" / "test_contract_memory.py", ON_GPU)
# What a dry run takes: enough to go through the plugin, the backend and test_gpu.py.
DRY_FILES, DRY_TESTS = (CONTRACT, ON_GPU), "score_entropy and (float32 or test_gpu)"
# Only our plugin: others that the machine happens to have may reorder tests, add processes, or be broken.
PYTEST = ["-m", "pytest", "-q", "--tb=short", "-p", "bench.gpu_suite.record", "-p", "no:cacheprovider"]
PYTEST_RAN = (0, 1, 5)  # all passed, some failed, nothing left to run


def test_files() -> list[Path]:
    """The files with tests over backends, the longest first, and test_gpu.py."""
    chosen = []
    for file in sorted(TESTS.rglob("test_*.py"), key=lambda f: (-shards_of(f, False), -f.stat().st_size)):
        if file == ON_GPU or re.search(r"\bover_backends\b|\bBACKENDS\b", file.read_text()):
            chosen.append(file)
    return chosen


def shards_of(file: Path, dry: bool) -> int:
    return 3 if file in SHARED and not dry else 1


def missing_modules() -> list[str]:
    return [name for name in ("pytest", "numpy") if importlib.util.find_spec(name) is None]


def run(run: Run, backend: str = "gpu") -> dict[str, Any]:
    lacking = missing_modules()
    if lacking and backend != "gpu":
        return {"status": "skipped", "reason": f"not installed: {', '.join(lacking)}", "summary": {}}
    if lacking:
        items, problem = run.worker("samples", item_seconds=ITEM_SECONDS)
        summary = summarize(items, problem)
        summary["summary"]["note"] = f"not installed: {', '.join(lacking)}; the samples of every op ran without pytest"
        return summary
    environment = {
        "TOKENPRUNE_TEST_BACKENDS": backend,
        "TOKENPRUNE_POISON": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }

    def one(part: tuple[Path, str]) -> tuple[list[work.Item], str | None]:
        file, shard = part
        record = run.work / f"{backend}-{file.parent.name}-{file.stem}-{shard[0]}.jsonl"
        command = [sys.executable, *PYTEST, str(file), *(["-k", DRY_TESTS] if run.dry else [])]
        return work.drive(
            command, record, deadline=run.deadline, item_seconds=ITEM_SECONDS, good_codes=PYTEST_RAN,
            environment={**environment, "TOKENPRUNE_RECORD": str(record), "TOKENPRUNE_SHARD": shard},
        )  # fmt: skip

    files = [f for f in test_files() if not run.dry or f in DRY_FILES]
    if backend != "gpu":
        files = [f for f in files if f != ON_GPU]
    items: list[work.Item] = []
    problems = []
    with ThreadPoolExecutor(max_workers=run.processes) as pool:
        parts = [
            (file, f"{n}/{shards}") for file in files for shards in [shards_of(file, run.dry)] for n in range(shards)
        ]
        for (file, _), (found, problem) in zip(parts, pool.map(one, parts), strict=True):
            items += found
            if problem is not None:
                problems.append(f"{file.relative_to(TESTS)}: {problem}")
    return summarize(items, "; ".join(problems)[:4000] or None)
