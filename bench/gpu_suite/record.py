"""A pytest plugin (`-p bench.gpu_suite.record`): runs the tests of one backend and records each as it ends.

TOKENPRUNE_TEST_BACKENDS is the backend, `gpu` (the CUDA kernels) or `triton`; TOKENPRUNE_RECORD names the file;
TOKENPRUNE_SHARD=1/3 takes the second third of the tests. What the record already has is not run again, and a failure
that leaves the device unusable ends the process: the driver goes on in a fresh one (work.py).
"""

import inspect
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from testing.gpu_device import dry

from . import work

_record = work.Record(Path(os.environ["TOKENPRUNE_RECORD"]))
_BACKEND = os.environ.get("TOKENPRUNE_TEST_BACKENDS", "gpu")
_began: dict[str, float] = {}


def concerns_the_gpu(item: Any) -> bool:
    """Tests of the backend, tests that go through all backends themselves, and test_gpu.py for the CUDA kernels."""
    parameters = getattr(item, "callspec", None)
    if parameters is not None and "backend" in parameters.params:
        return bool(parameters.params["backend"] == _BACKEND)
    if item.path.name == "test_gpu.py":
        return _BACKEND == "gpu"
    function = getattr(item, "function", None)
    return function is not None and "in BACKENDS" in inspect.getsource(inspect.unwrap(function))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine, shards = map(int, os.environ.get("TOKENPRUNE_SHARD", "0/1").split("/"))
    concerned = [item for item in items if concerns_the_gpu(item)]
    kept = [item for item in concerned[mine::shards] if item.nodeid not in _record.seen]
    if gone := [item for item in items if item not in set(kept)]:
        config.hook.pytest_deselected(items=gone)
        items[:] = kept


def pytest_runtest_logstart(nodeid: str) -> None:
    _record.start(nodeid)
    _began[nodeid] = time.monotonic()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        status, reason = report.outcome, ""
        if status == "skipped":
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:300]
            status = "missing" if "no CUDA kernel of" in reason else "skipped"
        elif status == "failed":
            reason = str(report.longrepr)[-1500:]
        took = round(time.monotonic() - _began.get(item.nodeid, time.monotonic()), 3)
        _record.finish(item.nodeid, status, took=took, **({"reason": reason} if reason else {}))
        if status == "failed" and torch.cuda.is_available() and not dry():
            try:
                torch.cuda.synchronize()
            except Exception as error:
                pytest.exit(f"the device is unusable: {str(error)[:200]}", returncode=work.BROKEN)
