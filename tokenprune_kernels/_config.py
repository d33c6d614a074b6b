"""What is installed and what loaded: the first thing to look at, and to paste into a bug report."""

import importlib.metadata
import platform
from typing import Any

import torch

from . import _backend, _registry
from ._version import __version__


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def config() -> dict[str, Any]:
    """Versions, architectures, and for each backend either None (available) or the reason why not.

    >>> import tokenprune_kernels as tp
    >>> tp.config()["backends"]["reference"] is None
    True
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "tokenprune_kernels": __version__,
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiled library": _registry.build_info() or f"not loaded: {_registry.load_error()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "backends": {
            "cpu": _backend.unavailable("cpu", "cpu"),
            "cuda": _backend.unavailable("cuda", device),
            "triton": _backend.unavailable("triton", device),
            "reference": None,
        },
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
