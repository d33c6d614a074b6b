"""What the tests of the greedy ops share: the way of large inputs, and launches that are only named."""

import pytest


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs go the way of large ones."""
    from tokenprune_kernels.triton import gram

    monkeypatch.setattr(gram, "GRAM_TOKENS", 0)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would be launched, instead of launches."""
    from tokenprune_kernels.triton import runtime

    names: list[str] = []
    monkeypatch.setattr(runtime, "recorder", lambda kernel, grid, args, keywords: names.append(kernel.fn.__name__))
    return names
