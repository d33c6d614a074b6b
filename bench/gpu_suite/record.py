"""A pytest plugin (`-p bench.gpu_suite.record`): runs the tests of one backend and records each as it ends.

TOKENPRUNE_TEST_BACKENDS is the backend, `gpu` (the CUDA kernels) or `triton`; TOKENPRUNE_RECORD names the file;
TOKENPRUNE_SHARD=1/3 takes the second third of the tests. What the record already has is not run again, and a failure
that leaves the device unusable ends the process: the driver goes on in a fresh one (work.py).
"""

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from testing.gpu_device import dry

from . import work

_RECORD = Path(os.environ["TOKENPRUNE_RECORD"])
_BACKEND = os.environ.get("TOKENPRUNE_TEST_BACKENDS", "gpu")


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
    share, shares = map(int, os.environ.get("TOKENPRUNE_SHARD", "0/1").split("/"))
    seen = work.read(_RECORD)
    mine = [item for item in items if concerns_the_gpu(item)][share::shares]
    kept = [item for item in mine if item.nodeid not in seen]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_runtest_logstart(nodeid: str) -> None:
    work.write(_RECORD, nodeid, work.STARTED)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and (report.when != "setup" or report.passed):
        return
    status, reason = str(report.outcome), {}
    if report.skipped:
        why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:300]
        status, reason = "missing" if "no CUDA kernel of" in why else "skipped", {"reason": why}
    elif report.failed:
        reason = {"reason": str(report.longrepr)[-1500:]}
    work.write(_RECORD, report.nodeid, status, took=round(report.duration, 3), **reason)
    if report.failed and not dry():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            pytest.exit(f"the device is unusable: {str(error)[:200]}", returncode=work.BROKEN)
