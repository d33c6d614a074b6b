"""NVIDIA's tools that look into compiled kernels."""

import functools
import importlib.metadata
import shutil


@functools.cache
def cuobjdump() -> str | None:
    """cuobjdump, from its package (it finds nvdisasm beside it) or from a toolkit."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "cuobjdump":
            return str(file.locate())
    return shutil.which("cuobjdump")
