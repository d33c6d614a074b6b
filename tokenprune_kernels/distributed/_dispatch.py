"""What torch.ops.tokenprune.* do when they are given DTensors.

torch's own way, register_sharding, is not enough for these ops: it never redistributes a keyword argument, as the masks
are, it remembers its choice for integer arguments only, so that a call with head_reduction="sum" would be reduced as
the call with "mean" before it, and it takes no list of tensors. So the whole rule is written out here, in DTensor's
public functions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from .. import _fakes
from .._checks import fail
from .._op import OPS, Op, TensorKind
from .._registry import as_runtime_error
from ._layouts import Layout, gather_layouts, layouts

_library = torch.library.Library("tokenprune", "FRAGMENT")  # keeps the registrations alive


def register() -> None:
    for name, op in OPS.items():
        rule = as_runtime_error(partial(_run, op))
        torch.library.register_torch_dispatch(f"tokenprune::{name}", DTensor, rule, lib=_library)


def _run(op: Op, cls: Any, function: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Any:
    with torch.no_grad():  # autograd, where there is any, has been here before
        values = op.bind(args, kwargs or {})
        tensors = _checked(op, values)
        whole = getattr(_fakes, op.name)(*_each(_without_memory, values))
        inputs, outputs = _chosen(op, values, tensors)
        local = iter([t.redistribute(placements=p).to_local() for t, p in zip(tensors, inputs, strict=True)])
        local_values = _each(lambda _: next(local), values)
        positional = sum(not a.keyword_only for a in op.arguments)
        keywords = {a.name: v for a, v in zip(op.arguments[positional:], local_values[positional:], strict=True)}
        results = function(*local_values[:positional], **keywords)
        mesh = tensors[0].device_mesh
        made = [
            DTensor.from_local(part, mesh, placements, run_check=False, shape=meta.shape, stride=meta.stride())
            for part, placements, meta in zip(_listed(results), outputs, _listed(whole), strict=True)
        ]
    return made[0] if isinstance(results, Tensor) else type(results)(made)


def _chosen(op: Op, values: list[Any], tensors: list[DTensor]) -> tuple[list[list[Placement]], list[list[Placement]]]:
    """The placements of all tensors that go in and come out, one for each dimension of the mesh."""
    named = {a.name: value for a, value in zip(op.arguments, values, strict=True)}
    sizes: dict[str, int] = {}
    for a in op.arguments:
        if isinstance(a.kind, TensorKind) and named[a.name] is not None:
            sizes.update(zip(a.kind.shape, named[a.name].shape, strict=True))
    chosen = []
    for d, ranks in enumerate(tensors[0].device_mesh.shape):
        now = [t.placements[d] for t in tensors]
        possible = layouts(op, named, sizes, ranks) if op.outputs else gather_layouts(named, now)
        layout = min(possible, key=partial(_moved, tensors, now))  # the first of those that move as little
        sizes.update({letter: -(-sizes[letter] // ranks) for letter in layout.letters})
        chosen.append(layout)
    return _by_tensor([c.inputs for c in chosen]), _by_tensor([c.outputs for c in chosen])


def _by_tensor(by_dimension: list[list[Placement]]) -> list[list[Placement]]:
    return [list(placements) for placements in zip(*by_dimension, strict=True)]


def _moved(tensors: list[DTensor], now: list[Placement], layout: Layout) -> int:
    """How many elements take part in communication: a tensor that is whole is only cut."""
    each = zip(tensors, now, layout.inputs, strict=True)
    return sum(t.numel() for t, p, wanted in each if p != wanted and not p.is_replicate())


def _checked(op: Op, values: list[Any]) -> list[DTensor]:
    """The tensors, all of them on one mesh."""
    found: list[DTensor] = []
    for a, value in zip(op.arguments, values, strict=True):
        many = isinstance(value, (list, tuple))
        for i, t in enumerate(value if many else [value]):
            name = f"{a.name}[{i}]" if many else a.name
            if isinstance(t, DTensor):
                if found and t.device_mesh != found[0].device_mesh:
                    fail(ValueError, op.name, name, f"be on {found[0].device_mesh}, as the others are", t.device_mesh)
                found.append(t)
            elif isinstance(t, Tensor):
                fail(
                    TypeError, op.name, name, "be a DTensor, as others are (distribute_tensor makes one)", "a plain one"
                )
    return found


def _each(function: Callable[[Any], Any], values: list[Any]) -> list[Any]:
    """The values with all tensors replaced, those in lists too."""

    def of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [of(v) for v in value]
        return function(value) if isinstance(value, Tensor) else value

    return [of(value) for value in values]


def _without_memory(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def _listed(results: Any) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results
