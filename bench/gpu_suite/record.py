"""A pytest plugin (`-p bench.gpu_suite.record`): runs the tests of backend "gpu" and records each as it ends.

TOKENPRUNE_RECORD names the file. Tests that it already has are not run again, and a failure that leaves the device
unusable ends the process, so that the driver can go on in a fresh one (work.py).
"""

import inspect
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from . import device, work

_record = work.Record(Path(os.environ["TOKENPRUNE_RECORD"]))
_began: dict[str, float] = {}


def concerns_the_gpu(item: Any) -> bool:
    """Tests of the backend, tests that go through all backends themselves, and tests/test_gpu.py."""
    parameters = getattr(item, "callspec", None)
    if parameters is not None and "backend" in parameters.params:
        return bool(parameters.params["backend"] == "gpu")
    if Path(str(item.fspath)).name == "test_gpu.py":
        return True
    function = getattr(item, "function", None)
    return function is not None and "in BACKENDS" in inspect.getsource(inspect.unwrap(function))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gone = [item for item in items if item.nodeid in _record.seen or not concerns_the_gpu(item)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]


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
        if status == "failed" and torch.cuda.is_available() and not device.dry():
            try:
                torch.cuda.synchronize()
            except Exception as error:
                pytest.exit(f"the device is unusable: {str(error)[:200]}", returncode=work.BROKEN)
