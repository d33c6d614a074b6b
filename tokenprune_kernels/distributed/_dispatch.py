"""What torch.ops.tokenprune.* do when they are given DTensors.

torch's own way, register_sharding, is not enough for these ops: it never redistributes a keyword argument, as the masks
are, it remembers its choice for integer arguments only, so that a call with head_reduction="sum" would be reduced as
the call with "mean" before it, and it takes no list of tensors. So the whole rule is written out here, in DTensor's
public functions.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
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


class Described(NamedTuple):
    """All that is asked of a DTensor before its values are."""

    shape: torch.Size
    dtype: torch.dtype
    placements: tuple[Placement, ...]


class Plan(NamedTuple):
    inputs: list[tuple[Placement, ...]]  # of every tensor
    outputs: list[tuple[tuple[Placement, ...], torch.Size, tuple[int, ...]]]  # placements, global shape, global stride


def _run(op: Op, cls: Any, function: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Any:
    with torch.no_grad():  # autograd, where there is any, has been here before
        values = op.bind(args, kwargs or {})
        tensors = _checked(op, values)
        mesh = tensors[0].device_mesh
        described = _each(lambda t: Described(t.shape, t.dtype, t.placements), values)
        try:
            plan = _plan(op, mesh, described)
        except TypeError:  # sizes of a graph that is being made have no hash
            plan = _plan.__wrapped__(op, mesh, described)
        local = iter([_placed(t, p).to_local() for t, p in zip(tensors, plan.inputs, strict=True)])
        local_values = _each(lambda _: next(local), values)
        positional = sum(not a.keyword_only for a in op.arguments)
        keywords = {a.name: v for a, v in zip(op.arguments[positional:], local_values[positional:], strict=True)}
        results = function(*local_values[:positional], **keywords)
        made = [
            DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
            for part, (placements, shape, stride) in zip(_listed(results), plan.outputs, strict=True)
        ]
    return made[0] if isinstance(results, Tensor) else type(results)(made)


def _placed(t: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    return t if t.placements == placements else t.redistribute(placements=placements)


@functools.lru_cache(maxsize=4096)
def _plan(op: Op, mesh: DeviceMesh, described: tuple[Any, ...]) -> Plan:
    """Where all tensors of a call have to lie, from all that it is given but the values: good arguments or an error."""
    tensors = list(_described(described))
    values = _each(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), described)
    whole = _listed(getattr(_fakes, op.name)(*values))
    named = {a.name: value for a, value in zip(op.arguments, values, strict=True)}
    sizes: dict[str, int] = {}
    for a in op.arguments:
        if isinstance(a.kind, TensorKind) and named[a.name] is not None:
            sizes.update(zip(a.kind.shape, named[a.name].shape, strict=True))
    chosen = []
    for d, ranks in enumerate(mesh.shape):
        now = [t.placements[d] for t in tensors]
        possible = layouts(op, named, sizes, ranks) if op.outputs else gather_layouts(named, now)
        layout = min(possible, key=partial(_moved, tensors, now))  # the first of those that move as little
        sizes.update({letter: -(-sizes[letter] // ranks) for letter in layout.letters})
        chosen.append(layout)
    outputs = zip(*(c.outputs for c in chosen), strict=True)
    return Plan(
        list(zip(*(c.inputs for c in chosen), strict=True)),
        [(placements, t.shape, t.stride()) for placements, t in zip(outputs, whole, strict=True)],
    )


def _moved(tensors: list[Described], now: list[Placement], layout: Layout) -> int:
    """How many elements take part in communication: a tensor that is whole is only cut."""
    each = zip(tensors, now, layout.inputs, strict=True)
    return sum(t.shape.numel() for t, p, wanted in each if p != wanted and not p.is_replicate())


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


def _each(function: Callable[[Any], Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """The values with all tensors, or their descriptions, replaced; those in lists too."""

    def of(value: Any) -> Any:
        if isinstance(value, (Tensor, Described)):
            return function(value)
        return tuple(map(of, value)) if isinstance(value, (list, tuple)) else value

    return tuple(map(of, values))


def _described(values: Sequence[Any]) -> Iterator[Described]:
    for value in values:
        if isinstance(value, Described):
            yield value
        elif isinstance(value, tuple):
            yield from _described(value)


def _listed(results: Any) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results
