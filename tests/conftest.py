"""Shared test setup: fresh allocations of the package are poisoned, so that an unwritten element shows up."""

import os
import sys
from collections import Counter
from collections.abc import Iterator

os.environ.setdefault("TOKENPRUNE_POISON", "1")  # read by the compiled library when it first allocates
if os.environ.get("TOKENPRUNE_TEST_WITHOUT_LIBRARY") == "1":  # of test_registry.py: as if there were none
    sys.modules["tokenprune_kernels._C"] = None  # type: ignore[assignment]

import pytest
import torch

# Before any test file: what a test file imports may import Triton, whose interpreter this turns on.
from testing.cases import DTYPES, NO_EMULATOR, dtypes_of, lacks

# Files whose tests compile, train or run a suite: few and long.
LONG = (
    "triton/test_compile.py",
    "bench/test_gpu_suite.py",
    "studies/test_vqa_training.py",
    "studies/test_retention.py",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_emulator() -> Iterator[None]:
    """No test sees the emulator's settings or launches of another."""
    if NO_EMULATOR is not None:
        yield
        return
    import emulator

    module = emulator.load()
    module.settings().reset()
    module.take_launches()
    yield
    module.settings().reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What calls several ops, as methods do, is skipped on a backend that one of them has no kernel for yet."""
    from tokenprune_kernels import BackendUnavailableError

    try:
        return (yield)
    except BackendUnavailableError as error:
        chosen = getattr(item, "callspec", None)
        if chosen is None or "backend" not in chosen.params or "kernel yet" not in str(error):
            raise
        pytest.skip(str(error))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU kernels take no float64 (contract section 1), Triton's interpreter no bfloat16: no tests, and so no skips."""
    from tokenprune_kernels._op import OPS

    def exists(item: pytest.Item) -> bool:
        parameters = getattr(item, "callspec", None)
        chosen = parameters.params if parameters else {}
        backend, dtype = chosen.get("backend"), chosen.get("dtype")
        return not (isinstance(backend, str) and dtype in DTYPES and dtype not in dtypes_of(backend))

    gone = [item for item in items if not exists(item)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if exists(item)]
    for item in items:
        chosen = getattr(item, "callspec", None)
        backend, op = (chosen.params.get(name) for name in ("backend", "op")) if chosen else (None, None)
        if isinstance(backend, str) and op in OPS and lacks(backend, op):
            item.add_marker(pytest.mark.skip(reason=lacks(backend, op)))
    # The longest file first: of two processes (CI has them) neither is then left alone with it. Of files that are not
    # LONG, the one with most tests is taken for the longest.
    number = Counter(item.path for item in items)
    items.sort(key=lambda item: ("/".join(item.path.parts[-2:]) not in LONG, -number[item.path], item.path))
