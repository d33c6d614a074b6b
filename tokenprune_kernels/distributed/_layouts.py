"""The ways in which the ranks of one dimension of a device mesh may share a call, from the description of its op."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from .._op import Op, Output, Sharding


class Layout(NamedTuple):
    """A placement for every tensor that goes in, and for every tensor that comes out."""

    inputs: list[Placement]
    outputs: list[Placement]
    letters: tuple[str, ...] = ()  # along whose dimensions the ranks share


def letters_of(op: Op, output: Output, values: dict[str, Any]) -> list[Any]:
    """The letters of an output's shape; a function of sizes is given the letters in their place."""
    if callable(output.shape):
        return output.shape({letter: letter for letter in op.sizes}, **values)
    return output.shape.split()


def allows(sharding: Sharding, values: dict[str, Any]) -> bool:
    def fits(value: Any, among: tuple[Any, ...]) -> bool:
        return all(word in among for word in value.split("+")) if isinstance(value, str) else value in among

    return all(
        fits(values[name], among) for name, among in sharding.only.items() if not isinstance(values[name], Tensor)
    )


def layouts(op: Op, values: dict[str, Any], sizes: dict[str, int], ranks: int) -> Iterator[Layout]:
    """Whole tensors on every rank, then the op's shardings that these arguments allow.

    sizes: of the letters, as far as other dimensions of the mesh have left them together.
    """
    inputs = [a.kind.shape for a in op.arguments if isinstance(values[a.name], Tensor)]  # type: ignore[union-attr]
    outputs = [letters_of(op, output, values) for output in op.outputs.values()]
    yield Layout([Replicate()] * len(inputs), [Replicate()] * len(outputs))
    for sharding in op.shardings:
        # Head groups must stay together, and an average of averages needs parts of one size.
        even = len(sharding.letters) > 1 or sharding.partial == "avg"
        if not allows(sharding, values) or (even and any(sizes[letter] % ranks for letter in sharding.letters)):
            continue
        yield Layout(
            [_split(sharding, shape) or Replicate() for shape in inputs],
            [_split(sharding, shape) or Partial(sharding.partial) for shape in outputs],
            sharding.letters,
        )


def _split(sharding: Sharding, shape: Sequence[Any]) -> Shard | None:
    dims = [d for d, letter in enumerate(shape) if letter in sharding.letters]
    return Shard(dims[0]) if dims else None


def gather_layouts(values: dict[str, Any], now: list[Placement]) -> Iterator[Layout]:
    """gather_compact: each tensor of the list may be split along any dimension but its tokens', or all by samples."""
    tensors, dims = values["tensors"], values["dims"]
    batch_dims = values["batch_dims"] or [0] * len(tensors)
    taken = [(d % t.dim(), b % t.dim()) for t, d, b in zip(tensors, dims, batch_dims, strict=True)]
    free: list[Placement] = [
        p if type(p) is Shard and p.dim not in used else Replicate() for p, used in zip(now, taken, strict=False)
    ]
    batch: list[Placement] = [Shard(b) for _, b in taken]
    yield Layout([*free, Replicate()], free)
    yield Layout([*batch, Shard(0)], batch, ("B",))
