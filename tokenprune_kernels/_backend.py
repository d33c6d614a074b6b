"""Which implementation serves a call: the argument, else `use_backend`, TOKENPRUNE_BACKEND, or the dispatcher."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from . import _registry

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")

_requested: ContextVar[str | None] = ContextVar("tokenprune_backend", default=None)
# torch.compile can neither trace a context variable nor guard on one; in compiled code the block entered last counts.
_entered_last: str | None = None
_from_environment = os.environ.get("TOKENPRUNE_BACKEND") or "auto"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_check_name(_from_environment, "TOKENPRUNE_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Send every call inside the block to one backend: `cuda`, `triton`, `cpu`, `reference` or `auto`.

    Holds for the current thread or task only (in code compiled by torch.compile: for the process). An explicit
    `backend=` argument still wins.

    >>> import torch, tokenprune_kernels as tp
    >>> with tp.use_backend("reference"):
    ...     tp.select_topk(torch.tensor([[0.1, 0.9, 0.5]]), 2)
    (tensor([[1, 2]]), tensor([2]))
    """
    global _entered_last
    token, before = _requested.set(_check_name(name, "backend")), _entered_last
    _entered_last = name
    try:
        yield
    finally:
        _entered_last = before
        _requested.reset(token)


def unavailable(name: str, device: str) -> str | None:
    """Why backend `name` cannot serve tensors on `device`, or None when it can."""
    if name == "cpu":
        if not _registry.compiled():
            return f"the compiled library is not loaded ({_registry.load_error()})"
        return None if device == "cpu" else f"the inputs are on {device}"
    if name == "cuda":
        if not _registry.compiled():
            return f"the compiled library is not loaded ({_registry.load_error()})"
        if not _registry.build_info().get("cuda_architectures"):
            return "this build has no CUDA kernels"
        return None if device == "cuda" else f"the inputs are on {device}"
    if name == "triton":
        return "this version has no Triton kernels"
    return None


def implementation(backend: str | None, tensor: Tensor) -> Any:
    """The namespace whose functions serve this call: torch.ops.tokenprune, or the reference module."""
    requested = _entered_last if torch.compiler.is_dynamo_compiling() else _requested.get()
    name = backend or requested or _from_environment
    if name == "auto":
        return torch.ops.tokenprune
    _check_name(name, "backend")
    if name == "reference":
        return _registry.reference
    reason = unavailable(name, tensor.device.type)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} was asked for, but {reason}")
    return torch.ops.tokenprune
