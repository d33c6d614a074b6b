"""Sample calls of every op, for the tests that hold all ops to the same promises; their inputs are op_inputs'."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokenprune_kernels  # noqa: F401  (registers the ops)
from tokenprune_kernels import _op as described
from tokenprune_kernels._op import Op, TensorKind, public_ops

from .op_inputs import FACTORIES, Factory, Sizes, integers


class Call(NamedTuple):
    op: str
    arguments: dict[str, Any]


# Where an op's arguments have a letter, these sizes of a sample stand for it. D is missing: it has to be at least one.
LETTERS = {
    "B": "batch", "N": "tokens", "M": "rows", "C": "channels", "Hq": "heads", "P": "axes",
    "V": "listed", "A": "listed", "R": "listed", "S": "listed", "G": "listed", "K": "k", "E": "channels",
}  # fmt: skip
OPS = public_ops()


def _sizes_of(op: Op) -> tuple[str, ...]:
    kinds = [a.kind for a in op.arguments]
    letters = {letter for kind in kinds if isinstance(kind, TensorKind) for letter in kind.shape}
    named = {LETTERS[letter] for letter in letters & LETTERS.keys()}
    return tuple(sorted(named | ({"k"} if count_of(op.name) else set())))


def count_of(op: str) -> str | None:
    """The argument that says how many entries to return."""
    return next((a.name for a in described.OPS[op].arguments if isinstance(a.kind, described.Count)), None)


# Whose indices ascend by token; the others' are in the order of selection.
ASCENDING = {op: all(o.ascending for o in described.OPS[op].outputs.values()) for op in OPS}
# Which sizes an op's inputs have.
SIZES_OF = {op: _sizes_of(described.OPS[op]) for op in OPS}
SIZES_OF["gather_compact"] = ("batch", "tokens", "channels", "k", "heads")  # of the tensors that _gather makes
# What the outputs are, in order: score and value (floating), index (-1 padded), count ([B]).
OUTPUTS = {op: tuple(o.kind for o in described.OPS[op].outputs.values()) for op in OPS if described.OPS[op].outputs}
SELECTING = tuple(op for op in OPS if count_of(op))
INDEX_INPUTS = {
    a.name for op in OPS for a in described.OPS[op].arguments if isinstance(a.kind, TensorKind) and a.kind.listed
}


def _value(kind: described.Kind | None, s: Sizes, dtype: torch.dtype, seed: int) -> Any:
    """Something for an argument of this kind."""
    if not isinstance(kind, TensorKind):
        return s.k
    shape = [int(x) if x.isdigit() else getattr(s, LETTERS.get(x, "channels")) for x in kind.shape]
    into = getattr(s, LETTERS[kind.listed]) if kind.listed else 0
    low, high = (-1, max(into, 1)) if kind.listed else (0, 2) if torch.bool in kind.dtypes else (-6, 7)
    wanted = dtype if kind.dtypes is described.FLOATS else kind.dtypes[0]
    return integers(low, high, *shape, dtype=wanted, seed=seed)


def _from_description(op: str) -> Factory:
    """A call with everything that has to be given, for an op that has no sample of its own yet."""
    required = [a for a in described.OPS[op].arguments if a.required]
    return lambda s, t: {a.name: _value(a.kind, s, t, 50 + i) for i, a in enumerate(required)}


for _op in OPS:
    FACTORIES.setdefault(_op, {"plain": _from_description(_op)})
SAMPLES = tuple((op, name) for op in OPS for name in FACTORIES[op])
SAMPLE_IDS = tuple(f"{op}-{name}" for op, name in SAMPLES)


def make(op: str, name: str = "plain", sizes: Sizes | None = None, dtype: torch.dtype = torch.float32) -> Call:
    return Call(op, FACTORIES[op][name](sizes or Sizes(), dtype))


def positional(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as (args, kwargs), as a caller would write them."""
    schema = getattr(torch.ops.tokenprune, call.op).default._schema
    given = dict(call.arguments)
    args = tuple(given.pop(a.name) for a in schema.arguments if not a.kwarg_only)
    return args, given


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def run(call: Call, backend: str) -> list[Tensor]:
    from testing.cases import RUNNERS  # the GPU suite makes samples where pytest may be missing

    args, kwargs = positional(call)
    return outputs(RUNNERS[backend](call.op, *args, **kwargs))


def run_op(call: Call) -> list[Tensor]:
    args, kwargs = positional(call)
    return outputs(getattr(torch.ops.tokenprune, call.op)(*args, **kwargs))


def tensors(call: Call) -> Iterator[tuple[str, Tensor, int]]:
    """(name, tensor, batch dimension) of every tensor argument; the list of gather_compact as tensors[0], ..."""
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            yield name, value, 0
        elif name == "tensors":
            for i, t in enumerate(value):
                yield f"tensors[{i}]", t, call.arguments["batch_dims"][i]


def map_tensors(call: Call, f: Callable[[str, Tensor], Tensor]) -> Call:
    mapped = {
        name: [f(f"tensors[{i}]", t) for i, t in enumerate(value)]
        if name == "tensors"
        else f(name, value)
        if isinstance(value, Tensor)
        else value
        for name, value in call.arguments.items()
    }
    return Call(call.op, mapped)


def with_arguments(call: Call, **changed: Any) -> Call:
    return Call(call.op, {**call.arguments, **changed})


def optional_tensors(op: str, sizes: Sizes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A value for each tensor that need not be given."""
    found = (a for a in described.OPS[op].arguments if not a.required and isinstance(a.kind, TensorKind))
    return {a.name: _value(a.kind, sizes, dtype, 70 + i) for i, a in enumerate(found)}


def one_sample(call: Call, b: int) -> Call:
    """The call on sample b alone."""
    dims = {name: batch_dim for name, _, batch_dim in tensors(call)}
    return map_tensors(call, lambda name, t: t.narrow(dims[name], b, 1))


def output_batch_dims(call: Call) -> list[int]:
    return call.arguments["batch_dims"] if call.op == "gather_compact" else [0] * len(OUTPUTS[call.op])


def promised(call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every output of the Python function, written down from the contract."""
    a = call.arguments
    first = next(t for _, t, _ in tensors(call))
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    if call.op == "gather_compact":
        kept = []
        for t, dim in zip(a["tensors"], a["dims"], strict=True):
            shape = list(t.shape)
            shape[dim] = a["indices"].shape[1]
            kept.append((tuple(shape), t.dtype))
        return kept
    batch = first.shape[0]
    if call.op in SELECTING:
        k = a[str(count_of(call.op))]
        of_scores = (batch, k) if call.op != "density_peaks" else tuple(first.shape[:2])
        by_kind = {"index": ((batch, k), torch.int64), "count": ((batch,), torch.int64), "score": (of_scores, wide)}
        return [by_kind[kind] for kind in OUTPUTS[call.op]]
    if call.op == "merge_tokens":
        slots, tokens, channels = a["targets"].shape[1], first.shape[1], first.shape[2]
        return [
            ((batch, slots, channels), first.dtype), ((batch, slots), wide), ((batch, tokens), torch.int64)
        ]  # fmt: skip
    if call.op in ("cosine_scores", "contrastive_scores", "paired_cosine"):
        return [(tuple(first.shape[:2]), wide)]
    if "query" not in a:
        return [((batch,), wide)]
    rows = tuple(a["query"].shape[:3])
    if call.op == "attention_entropy":
        return [(rows, wide), (rows, wide)]
    reductions = a.get("query_reduction", "mean").split("+")
    kept = (rows[1],) if a.get("head_reduction") == "none" else ()
    kept += (rows[2],) if reductions == ["none"] else ()
    width = a["key_indices"].shape[1] if "key_indices" in a else a["key"].shape[2]
    scores = ((batch, *((len(reductions),) if len(reductions) > 1 else ()), *kept, width), wide)
    return [scores, (rows, wide), (rows, wide)] if call.op == "cross_attention_scores" else [scores]
