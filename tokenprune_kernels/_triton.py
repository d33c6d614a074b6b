"""Where Triton kernels are reached: torch.ops.tokenprune_triton, and torch.ops.tokenprune on GPUs nothing else serves.

Triton is imported by the first call that needs it, because the import takes longer than that of this whole package.
"""

import functools
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from . import _autograd, _fakes, _vmap
from ._checks import on_dense
from ._op import OPS

OLDEST = (3, 6)  # pairs with torch 2.10

_LIBRARIES: list[torch.library.Library] = []  # registrations live as long as their library
_defining = threading.Lock()


@functools.cache
def absent() -> str | None:
    """Why there is no usable Triton here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton") if _distribution() else None
    if version is not None and tuple(int(v) for v in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST))}"
    return None


def _distribution() -> bool:
    """Builds for AMD and Intel come under other names (pytorch-triton-rocm, pytorch-triton-xpu): no version to ask."""
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def interpreted() -> bool:
    """TRITON_INTERPRET=1: the kernels run on CPU tensors, slowly, through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: str) -> str | None:
    """Why the Triton kernels cannot serve tensors on `device`, or None; then torch.ops.tokenprune_triton is there."""
    reason = absent()
    if reason is not None:
        return reason
    if device == "cpu" and not interpreted():
        return "the inputs are on cpu: the kernels need a GPU (or TRITON_INTERPRET=1 from the start, for tests)"
    if device not in ("cpu", "cuda", "xpu"):
        return f"the inputs are on {device}"
    namespace()
    return None


# torch.compiler.assume_constant_result does this, and imports all of Dynamo, and with it Triton, on the way.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _wrapper(name: str) -> Callable[..., Any]:
    """The Triton implementation of an op; its module is imported by the first call."""
    from ._registry import as_runtime_error

    @functools.cache
    def loaded() -> Callable[..., Any]:
        from . import triton

        return as_runtime_error(on_dense(name, getattr(triton, name)))

    def run(*args: Any, **kwargs: Any) -> Any:
        return loaded()(*args, **kwargs)

    return run


def _seen_through(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.library.triton_op does: under torch.compile, the op dissolves into its kernels, which Inductor knows.

    torch.library.triton_op itself would make outputs require grad and take the schema from annotations.
    """

    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        # An exported program keeps the op: it has to be loadable where the kernels' Python source is not.
        if first.device.type == "cpu" or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        from .triton import runtime

        with mode, runtime.traced():
            return run(*args, **(kwargs or {}))

    return rule


# torch.compile keeps them as ops: launches take lists of tensors of any dtype, or walk samples and panels on the host.
_OPAQUE = ("gather_compact", "density_peaks")


def _see_through(library: torch.library.Library, namespace: str, names: Any) -> None:
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    for name in names:
        if name not in _OPAQUE:
            torch.library.register_torch_dispatch(
                f"{namespace}::{name}", FunctionalTensorMode, _seen_through(name, _wrapper(name)), lib=library
            )


def served() -> list[str]:
    """The names of the ops with a Triton kernel."""
    return [name for name, op in OPS.items() if "triton" in op.backends]


def namespace() -> Any:
    """torch.ops.tokenprune_triton: the ops with a Triton kernel, on every device that it takes."""
    with _defining:  # the first calls of two threads would define the ops twice, which torch refuses
        return _namespace()


@functools.cache
def _namespace() -> Any:
    from ._registry import as_runtime_error

    library = torch.library.Library("tokenprune_triton", "FRAGMENT")
    names = served()
    for name in names:
        library.define(name + OPS[name].schema)
        library.impl(name, _wrapper(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"tokenprune_triton::{name}", as_runtime_error(getattr(_fakes, name)), lib=library)
    _autograd.register(library, torch.ops.tokenprune_triton, names)
    _vmap.register(library, torch.ops.tokenprune_triton, names)
    if not interpreted():
        _see_through(library, "tokenprune_triton", names)
    _LIBRARIES.append(library)
    return torch.ops.tokenprune_triton


def serve(library: torch.library.Library, cuda: bool) -> None:
    """Make Triton the implementation of torch.ops.tokenprune on GPUs: on Intel's (XPU) and, with `cuda`, on CUDA's key.

    ROCm builds of torch dispatch AMD GPUs under the key CUDA too.
    """
    if absent() is not None:
        return
    names = served()
    for name in names:
        for key in ("XPU", "CUDA") if cuda else ("XPU",):
            library.impl(name, _wrapper(name), key, allow_override=True)
    if cuda:
        _see_through(library, "tokenprune", names)
