"""What several files ask the demo about."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with 36 visual tokens."""
    from tests.transformers.vlm import saved

    return saved.llava(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noise, so that no two patches are alike."""
    import numpy as np
    from PIL import Image

    path = tmp_path_factory.mktemp("photo") / "own.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(path)
    return str(path)
