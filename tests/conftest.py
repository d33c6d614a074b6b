"""Shared test setup: fresh allocations of the package are poisoned, so that an element nobody writes shows up."""

import os

os.environ.setdefault("TOKENPRUNE_POISON", "1")  # read by the compiled library when it first allocates

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
