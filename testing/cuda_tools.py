"""NVIDIA's tools that look into compiled kernels."""

import functools
import importlib.metadata
import shutil


def tool(name: str) -> str | None:
    """A program, from its package nvidia-cuda-<name> or from a toolkit."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return str(file.locate())
    return shutil.which(name)


@functools.cache
def cuobjdump() -> str | None:
    return tool("cuobjdump")


@functools.cache
def nvdisasm() -> str | None:
    return tool("nvdisasm")
