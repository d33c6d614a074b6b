"""Shared test setup: fresh allocations of the package are poisoned, so that an element nobody writes shows up."""

import os
import sys

os.environ.setdefault("TOKENPRUNE_POISON", "1")  # read by the compiled library when it first allocates
if os.environ.get("TOKENPRUNE_TEST_WITHOUT_LIBRARY") == "1":  # test_registry.py runs some tests as if there were none
    sys.modules["tokenprune_kernels._C"] = None  # type: ignore[assignment]

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
