"""What is installed and what loaded: the first thing to look at, and to paste into a bug report."""

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

from . import _backend, _registry
from ._op import public_ops
from ._version import __version__


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    """The release of the CUDA compiler on the path, which need not be the one that built the library."""
    if (command := shutil.which("nvcc")) is None:
        return None
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    return said.partition("release ")[2].partition(",")[0] or None


def _driver() -> str | None:
    """The newest CUDA that the GPU's driver runs."""
    version = _registry.driver_version()
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else None


def _capability() -> str | None:
    return ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None


def config() -> dict[str, Any]:
    """Versions, architectures, for each backend either None (available) or the reason why not, and what serves each op.

    `ops` names, for every kind of device that is here, the backend that an op runs on with `backend="auto"`.

    >>> import tokenprune_kernels as tp
    >>> tp.config()["backends"]["reference"] is None
    True
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = dict.fromkeys(("cpu", device))
    return {
        "tokenprune_kernels": __version__,
        "torch": torch.__version__,
        **{package: _version_of(package) for package in ("triton", "transformers", "vllm", "sglang", "kernels")},
        "nvcc": _nvcc(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiled library": _registry.build_info() or f"not loaded: {_registry.load_error()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "compute capability": _capability(),
        "driver": _driver(),
        "backends": {
            "cpu": _backend.unavailable("cpu", "cpu"),
            "cuda": _backend.unavailable("cuda", device),
            "triton": _backend.unavailable("triton", device),
            "reference": None,
        },
        "ops": {op: ", ".join(f"{_backend.automatic(op, kind)} on {kind}" for kind in kinds) for op in public_ops()},
    }


def show_config() -> None:
    """Print `config()`, one line per fact.

    >>> import tokenprune_kernels as tp
    >>> tp.show_config()  # doctest: +ELLIPSIS
    tokenprune_kernels: ...
    """
    lines = []
    for name, value in config().items():
        if not isinstance(value, dict):
            lines.append(f"{name}: {value}")
            continue
        lines.append(f"{name}:")
        for key, inner in value.items():
            state = "available" if inner is None else f"unavailable, {inner}"
            lines.append(f"  {key}: {state if name == 'backends' else inner}")
    print("\n".join(lines))
