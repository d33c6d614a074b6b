"""Every op without values: `_fakes.<op>(...)` checks its arguments and returns outputs of the right shapes and dtypes.

For torch.compile, export and meta tensors, and to allocate outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._checks import check
from ._op import OPS, Op


def _empty_outputs(op: Op, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    sizes = check(op, values)
    if op.fake is not None:
        return op.fake(*values)
    first = next(v for v in values if isinstance(v, Tensor))
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    made = []
    for output in op.outputs.values():
        if callable(output.shape):
            shape = output.shape(sizes, **{a.name: v for a, v in zip(op.arguments, values, strict=True)})
        else:
            shape = [sizes[letter] for letter in output.shape.split()]
        dtype = {"score": wide, "value": first.dtype}.get(output.kind, torch.int64)
        made.append(first.new_empty(shape, dtype=dtype))
    return made[0] if len(made) == 1 else tuple(made)


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPS:
        raise AttributeError(f"there is no op {name}")
    return partial(_empty_outputs, OPS[name])
