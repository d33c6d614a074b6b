"""The table of docs/distributed.md: along which dimensions each op may be split, from the ops' descriptions."""

from collections.abc import Iterator
from typing import Any

from testing.method_tables import code, table
from tokenprune_kernels._op import OPS, Op, Sharding, public_ops
from tokenprune_kernels.distributed._layouts import layouts, letters_of

PARTIAL = {"sum": "a part of the sum", "avg": "a part of the average"}


def _when(sharding: Sharding) -> str:
    words = {False: "off", None: "not given"}
    return "; ".join(
        f"`{name}` {', '.join(words.get(value, str(value)) for value in among)}"
        for name, among in sharding.only.items()
    )


def _results(op: Op, sharding: Sharding) -> Iterator[str]:
    """What comes out, for the first of the values that each argument may have."""
    values: dict[str, Any] = {a.name: None if a.required else a.default for a in op.arguments}
    values |= {name: among[0] for name, among in sharding.only.items()}
    possible = layouts(op, values, dict.fromkeys(op.sizes, 0), ranks=1)
    outputs = next(layout.outputs for layout in possible if layout.letters == sharding.letters)
    for (name, output), placement in zip(op.outputs.items(), outputs, strict=True):
        letters = letters_of(op, output, values)
        what = PARTIAL[placement.reduce_op] if placement.is_partial() else f"along {letters[placement.dim]}"
        yield what if name == op.name else f"`{name}` {what}"


def _rows() -> Iterator[tuple[str, ...]]:
    ops = [OPS[name] for name in public_ops() if OPS[name].outputs]
    yield code(op.name for op in ops), "B", "", "every result along B"
    yield "`gather_compact`", "B, each tensor in its batch dimension", "", "the same"
    yield "", "any but B and the tokens, each tensor for itself", "", "the same"
    for op in ops:
        for i, sharding in enumerate(op.shardings[1:]):
            along = ", ".join(sharding.letters)
            yield "" if i else f"`{op.name}`", along, _when(sharding), "; ".join(_results(op, sharding))


def shardings() -> str:
    return table(("op", "split along", "when", "results"), _rows())
