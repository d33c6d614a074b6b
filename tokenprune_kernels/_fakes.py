"""Every op without values: `_fakes.<op>(...)` checks its arguments and returns outputs of the right shapes and dtypes.

For torch.compile, export and meta tensors, and to allocate outputs: the Triton kernels do in every call, so here too an
expression is made of the description, once per op.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ._accept import checked_sizes
from ._op import OPS, Op, TensorKind


@functools.cache
def _allocation(op: Op) -> Callable[..., Any]:
    """The outputs as a function of the sizes and of all arguments in the order of the schema."""
    fake = op.fake
    if fake is not None:
        return lambda _, *values: fake(*values)
    first = next(a.name for a in op.arguments if isinstance(a.kind, TensorKind))
    arguments = [a.name for a in op.arguments]
    names: dict[str, Any] = {"int64": torch.int64, "float32": torch.float32, "float64": torch.float64}
    wide = f"float64 if {first}.dtype is float64 else float32"
    dtypes = {"score": wide, "value": f"{first}.dtype", "index": "int64", "count": "int64"}
    made = []
    for name, output in op.outputs.items():
        # Sizes one by one: new_empty takes half a microsecond more to look through a list.
        shape = ", ".join(f"_sizes[{size!r}]" for size in str(output.shape).split())
        if callable(output.shape):
            names[f"_{name}"] = output.shape
            shape = f"*_{name}(_sizes, {', '.join(f'{a}={a}' for a in arguments)})"
        made.append(f"{first}.new_empty({shape}, dtype={dtypes[output.kind]})")
    results = made[0] if len(made) == 1 else f"({', '.join(made)})"
    allocate: Callable[..., Any] = eval(f"lambda _sizes, {', '.join(arguments)}: {results}", names)
    return allocate


def _empty_outputs(op: Op, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    return _allocation(op)(checked_sizes(op, values), *values)


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPS:
        raise AttributeError(f"there is no op {name}")
    made = globals()[name] = functools.partial(_empty_outputs, OPS[name])
    return made
