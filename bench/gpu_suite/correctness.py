"""The tests of backend "gpu" or "triton", a process per test file; without pytest, the samples of every op."""

import importlib.util
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from testing import ROOT

from .work import Item, Run, Stage, drive, summarize

TESTS = ROOT / "tests"
CONTRACT, ON_GPU = TESTS / "ops" / "test_contract.py", TESTS / "cuda" / "test_gpu.py"
# The files over all ops are shared between processes.
SHARED, SHARES = (CONTRACT, TESTS / "ops" / "test_contract_memory.py", ON_GPU), 3
# What a dry run takes: enough to go through the plugin, the backend and test_gpu.py.
DRY_FILES, DRY_TESTS = (CONTRACT, ON_GPU), "score_entropy and (float32 or test_gpu)"
# Only our plugin: others that the machine happens to have may reorder tests, add processes, or be broken.
PYTEST = ["-m", "pytest", "-q", "--tb=short", "-p", "bench.gpu_suite.record", "-p", "no:cacheprovider"]
PYTEST_RAN = (0, 1, 5)  # all passed, some failed, nothing left to run


def test_files(backend: str) -> list[Path]:
    """The files with tests over backends, the longest first, and for the CUDA kernels test_gpu.py."""
    chosen = [
        file
        for file in TESTS.rglob("test_*.py")
        if (file == ON_GPU and backend == "gpu") or re.search(r"\bover_backends\b|\bBACKENDS\b", file.read_text())
    ]
    return sorted(chosen, key=lambda file: (file not in SHARED, -file.stat().st_size))


def run(run: Run, backend: str = "gpu") -> Stage:
    if lacking := [name for name in ("pytest", "numpy") if importlib.util.find_spec(name) is None]:
        reason = f"not installed: {', '.join(lacking)}"
        if backend != "gpu":
            return {"status": "skipped", "reason": reason, "summary": {}}
        stage = run.worker("samples")
        stage["summary"]["note"] = f"{reason}; the samples of every op ran without pytest"
        return stage
    environment = {
        "TOKENPRUNE_TEST_BACKENDS": backend,
        "TOKENPRUNE_POISON": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }

    def one(file: Path, share: int, shares: int) -> tuple[list[Item], str | None]:
        record = run.work / f"{backend}-{file.parent.name}-{file.stem}-{share}.jsonl"
        items, problem = drive(
            [sys.executable, *PYTEST, str(file), *(["-k", DRY_TESTS] if run.dry else [])], record,
            deadline=run.deadline, good_codes=PYTEST_RAN,
            environment={**environment, "TOKENPRUNE_RECORD": str(record), "TOKENPRUNE_SHARD": f"{share}/{shares}"},
        )  # fmt: skip
        return items, problem and f"{file.relative_to(TESTS)}: {problem}"

    files = [file for file in test_files(backend) if not run.dry or file in DRY_FILES]
    shares = [SHARES if file in SHARED and not run.dry else 1 for file in files]
    with ThreadPoolExecutor(max_workers=run.processes) as pool:
        parts = [pool.submit(one, f, share, n) for f, n in zip(files, shares, strict=True) for share in range(n)]
        done = [part.result() for part in parts]
    problems = "; ".join(problem for _, problem in done if problem)
    return summarize([item for items, _ in done for item in items], problems[:4000] or None)
