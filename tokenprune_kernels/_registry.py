"""Makes torch.ops.tokenprune.* exist: from the compiled library where there is one, from the references otherwise.

On GPUs without compiled kernels Triton serves.
"""

import ctypes
import functools
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from . import _autograd, _fakes, _triton, _vmap, reference
from ._checks import on_dense
from ._op import OPS, compiled_ops
from ._version import __version__

_library: torch.library.Library | None = None  # keeps the registrations alive
_binary: Any = None
_load_error: str | None = None


def compiled() -> bool:
    """Is the compiled library loaded?"""
    return _binary is not None


def load_error() -> str | None:
    """Why the compiled library is not loaded, or None."""
    return _load_error


@functools.cache
def build_info() -> dict[str, Any]:
    """What the compiled library says about its build; empty without one."""
    return json.loads(_binary.build_info()) if _binary is not None else {}


def has_cuda_kernels() -> bool:
    """Does the compiled library hold CUDA kernels that this torch can run? A ROCm build calls its GPUs cuda too."""
    return bool(build_info().get("cuda_architectures")) and torch.version.hip is None


def fits(architectures: str, major: int, minor: int) -> bool:
    """Does code for these architectures ("8.0;9.0a;12.0+PTX") run on a device of this compute capability?

    Binary code runs on later minor versions of its major one, architecture-specific code ("a") on its own version
    only, and PTX on everything later.
    """
    for entry in architectures.split(";"):
        version = entry.removesuffix("+PTX")
        built = tuple(int(v) for v in version.rstrip("af").split("."))
        if version.endswith("a"):
            if built == (major, minor):
                return True
        elif built <= (major, minor) and (built[0] == major or entry.endswith("+PTX")):
            return True
    return False


def driver_version() -> int:
    """The newest CUDA whose programs the installed driver runs (13000: 13.0), or 0 where none can be asked."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


@functools.cache
def old_driver() -> str | None:
    """Why the driver cannot run the compiled CUDA kernels, or None. It runs all minor versions of its CUDA."""
    runtime = build_info().get("cuda_runtime", 0)
    driver = driver_version() if runtime else 0
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return None
    found, needed = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
    return f"the GPU's driver runs CUDA {found} and older, and the compiled kernels were built with CUDA {needed}"


@functools.cache
def _fits_device(index: int) -> bool:
    """Asked once per GPU, so that later calls ask CUDA for nothing."""
    if reason := old_driver():
        warnings.warn(f"tokenprune_kernels cannot use its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2)
        return False
    return fits(build_info()["cuda_architectures"], *torch.cuda.get_device_capability(index))


def lacks_binary(device_index: int) -> bool:
    """Is there compiled CUDA code, but none that runs on this GPU with this driver?"""
    return has_cuda_kernels() and not _fits_device(device_index)


# torch.compile takes the result for a constant; torch.compiler.assume_constant_result, which says so, imports Dynamo.
lacks_binary._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_runtime_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.ops promises RuntimeError for bad arguments, from every implementation."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise RuntimeError(str(error)) from None

    return wrapped


def _reference(name: str) -> Callable[..., Any]:
    """The reference as the op, whose scores are [B, R, ...] where R = 1 too."""
    compute: Callable[..., Any] = getattr(reference, name)
    if not name.endswith("attention_scores"):
        return compute

    def run(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        if "+" in kwargs.get("query_reduction", "mean"):
            return result
        return result.unsqueeze(1) if name == "attention_scores" else (result[0].unsqueeze(1), *result[1:])

    return run


# The namespace of `backend="reference"`, filled by `load`.
references = SimpleNamespace()


def _without_dispatcher(name: str) -> Callable[..., Any]:
    """The reference called through the package: without a gradient, but for gather_compact, differentiable anywhere."""
    run = _reference(name)
    return on_dense(name, run if name == "gather_compact" else torch.no_grad()(run))


def _fallback(name: str) -> Callable[..., Any]:
    """The reference behind the op: checked, and below autograd."""
    compute, check = torch.no_grad()(_reference(name)), getattr(_fakes, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return compute(*args, **kwargs)

    return as_runtime_error(on_dense(name, run))


def _claim_ops() -> None:
    """A second copy in one process, as the kernel hub can bring one, would define the same ops and end in a crash."""
    this = f"tokenprune_kernels {__version__} in {Path(__file__).resolve().parent}"
    first = vars(torch).setdefault("_tokenprune_kernels", this)
    if first is not this:
        raise ImportError(f"{first} has defined torch.ops.tokenprune, and so would {this}: import only one of them")


def load() -> None:
    """Load the compiled library, or define the ops from the references; then add fakes, autograd, vmap and Triton."""
    global _library, _binary, _load_error
    if _library is not None:
        return
    _claim_ops()
    try:
        _binary = importlib.import_module("._C", __package__)
    except ModuleNotFoundError:
        _load_error = "no compiled library was built: no C++ compiler at installation, or TOKENPRUNE_CPU=0"
    except ImportError as error:
        _load_error = str(error)
    if _binary is None:
        warnings.warn(
            f"tokenprune_kernels runs on its slow PyTorch references: {_load_error}", RuntimeWarning, stacklevel=3
        )
    _library = torch.library.Library("tokenprune", "FRAGMENT")
    compiled = compiled_ops()
    for name, op in OPS.items():
        if _binary is None or name not in compiled:
            _library.define(name + op.schema)
        setattr(references, name, _without_dispatcher(name))
        # Serves every device that has no kernel of its own.
        _library.impl(name, _fallback(name), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"tokenprune::{name}", as_runtime_error(getattr(_fakes, name)), lib=_library, allow_override=True
        )
    _autograd.register(_library, torch.ops.tokenprune, OPS)
    _vmap.register(_library, torch.ops.tokenprune, OPS)
    _triton.serve(_library, cuda=not has_cuda_kernels())
