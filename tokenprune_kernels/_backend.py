"""Which implementation serves a call: the argument, else `use_backend`, TOKENPRUNE_BACKEND, or the dispatcher."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _registry, _triton
from ._accept import good_sizes
from ._checks import check, fail
from ._convert import by_budget, converted, samples_of
from ._op import OPS, Count, Op

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


class _Requested(threading.local):
    """What `use_backend` asks for. Thread-local and not a ContextVar: torch.compile traces and guards it."""

    def __init__(self) -> None:
        self.name: str | None = None  # an instance attribute, because a class attribute would not be guarded


_requested = _Requested()
_from_environment = os.environ.get("TOKENPRUNE_BACKEND") or "auto"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


# Further namespaces of ops by backend name, each with the backend whose kernels it has: the tests add the CUDA kernels
# emulated on the host.
_extra: dict[str, tuple[Any, str]] = {}


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS and name not in _extra:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_check_name(_from_environment, "TOKENPRUNE_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Send every call inside the block to one backend: `cuda`, `triton`, `cpu`, `reference` or `auto`.

    Holds for the current thread only, and works inside torch.compile. An explicit `backend=` argument still wins.

    >>> import torch, tokenprune_kernels as tp
    >>> with tp.use_backend("reference"):
    ...     tp.select_topk(torch.tensor([[0.1, 0.9, 0.5]]), 2)
    (tensor([[1, 2]]), tensor([2]))
    """
    before = _requested.name
    _requested.name = _check_name(name, "backend")
    try:
        yield
    finally:
        _requested.name = before


def unavailable(name: str, device: torch.device | str) -> str | None:
    """Why backend `name` cannot serve tensors on a device, or None when it can. "cuda" is the current GPU."""
    device = torch.device(device)
    if name == "cpu":
        if not _registry.compiled():
            return f"the compiled library is not loaded ({_registry.load_error()})"
        return None if device.type == "cpu" else f"the inputs are on {device.type}"
    if name == "cuda":
        if not _registry.compiled():
            return f"the compiled library is not loaded ({_registry.load_error()})"
        if not _registry.has_cuda_kernels():
            return "this build has no CUDA kernels"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if device.type != "cuda":
            return f"the inputs are on {device.type}"
        if reason := _registry.old_driver():
            return reason
        if _registry.lacks_binary(torch.cuda.current_device() if device.index is None else device.index):
            return f"this build is for {_registry.build_info()['cuda_architectures']}, which this GPU cannot run"
        return None
    if name == "triton":
        return _triton.unavailable(device.type)
    return None


# Under torch.compile the answer is a constant, as torch.compiler.assume_constant_result (which imports Dynamo) would
# have it: it asks the compiled library, which cannot be traced.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def served_by(op: str, tensor: Tensor) -> str:
    """The backend that this op runs on now, for this tensor."""
    name = _requested.name or _from_environment
    if name != "auto":
        return name
    return automatic(op, tensor.device)


def automatic(op: str, device: torch.device | str) -> str:
    """The backend that `auto` means for this op on this device."""
    for candidate in ("cpu", "cuda", "triton"):
        if lacks(candidate, op) is None and unavailable(candidate, device) is None:
            return candidate
    return "reference"


def implementation(backend: str | None, tensor: Tensor, op: str) -> Any:
    """The namespace whose function serves this call of an op: torch.ops.tokenprune, or another one with its ops."""
    name = backend or _requested.name or _from_environment
    if name == "auto":
        # The dispatcher knows devices by kind only. A GPU that the compiled code was not built for has Triton.
        if tensor.is_cuda and _registry.lacks_binary(tensor.device.index) and _triton.unavailable("cuda") is None:
            return torch.ops.tokenprune_triton
        return torch.ops.tokenprune
    _check_name(name, "backend")
    if name == "reference":
        return _registry.references
    reason = lacks(name, op) or (None if name in _extra else unavailable(name, tensor.device))
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} was asked for, but {reason}")
    if name in _extra:
        return _extra[name][0]
    return torch.ops.tokenprune_triton if name == "triton" else torch.ops.tokenprune


def lacks(backend: str, op: str) -> str | None:
    """What to say where an op has no kernel for a backend, or None where it has one."""
    backend = _extra[backend][1] if backend in _extra else backend
    return None if backend in OPS[op].backends else f"{op} has no {backend} kernel yet"


def checked(op: Op, values: Sequence[Any]) -> Sequence[Any]:
    """The arguments in the order of the schema, as the op takes them; raises where one is wrong."""
    if good_sizes(op, values) is None:
        values = converted(op, values)
        check(op, values)
    return values


def call(name: str, backend: str | None, *args: Any, **kwargs: Any) -> Any:
    """Check the arguments of an op, all of them and in the order of its schema, and make one call of the backend."""
    op = OPS[name]
    if good_sizes(op, (*args, *kwargs.values())) is None:
        return _call_as_written(op, backend, (*args, *kwargs.values()))
    first = args[0] if isinstance(args[0], Tensor) else args[1]
    return getattr(implementation(backend, first, name), name)(*args, **kwargs)


def _call_as_written(op: Op, backend: str | None, given: Sequence[Any]) -> Any:
    """The same with what callers may write instead of what the op takes."""
    values = converted(op, given)
    at = next((i for i, a in enumerate(op.arguments) if isinstance(a.kind, Count)), None)
    if at is None or not isinstance(values[at], list):
        check(op, values)
        return _serve(op, backend, values)
    numbers, values[at] = values[at], max(values[at])
    own = next((i for i, a in enumerate(op.arguments) if a.name == "budgets" and not a.required), None)
    if own is not None:
        if values[own] is not None:
            fail(
                ValueError, op.name, "budgets", f"be None where {op.arguments[at].name} has a number per sample", "both"
            )
        values[own] = torch.tensor(numbers).to(given[0].device, non_blocking=True)
    check(op, values)
    if own is not None:
        return _serve(op, backend, values)

    def of_samples(k: int, samples: list[int]) -> Any:
        part = [samples_of(value, samples) if isinstance(value, Tensor) else value for value in values]
        return _serve(op, backend, [*part[:at], k, *part[at + 1 :]])

    return by_budget(numbers, of_samples)


def _serve(op: Op, backend: str | None, values: Sequence[Any]) -> Any:
    """One call of the backend, with checked arguments in the order of the schema."""
    first = values[0] if isinstance(values[0], Tensor) else values[1]
    positional = sum(not a.keyword_only for a in op.arguments)
    keywords = {a.name: value for a, value in zip(op.arguments[positional:], values[positional:], strict=True)}
    return getattr(implementation(backend, first, op.name), op.name)(*values[:positional], **keywords)
