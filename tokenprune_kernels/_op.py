"""What an op is, said once: its schema, argument checks, fake and test samples follow from its description.

`@op(...)` stands above the public function in tokenprune_kernels/ops/<op>.py. The names, order and defaults of the
arguments come from the signature below it; the decorator says what a signature cannot: dtypes, shapes in the letters of
the contract, ranges, options, outputs and backends. scripts/generate_ops.py makes the C++ half of it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
# How many tokens to keep, as a caller may write it: a number of them, a share of all, or one of these per sample.
Budget = int | float | Sequence[int | float] | Tensor
# What gather_compact takes, and one number for all tensors or one for each.
Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
PerTensor = int | Sequence[int] | Mapping[str, int]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
)  # of indices to a Python function; uint8 may be a mask
COMPILED = ("cpu", "cuda")  # backends of the compiled library
KERNELS = (*COMPILED, "triton")  # every backend but the reference, which all ops have

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Tensors: "Tensor[]",
    int: "SymInt",
    Budget: "SymInt",
    Budget | None: "SymInt",
    PerTensor: "int[]",
    PerTensor | None: "int[]?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
}
# Keywords of the Python functions that the ops lack.
PYTHON_ONLY = ("layout", "backend")


class TensorKind(NamedTuple):
    """A tensor of one of `dtypes`, of any where that is empty; `shape` names its sizes by letters, which agree over all
    arguments, or by digits."""

    shape: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    like: str = ""  # the first tensor, whose dtype it has
    listed: str = ""  # the letter of what its values are indices into, -1 for none
    coordinates: bool = False  # of tokens: Python functions take integers too, and [N, P] for all samples alike

    @property
    def text(self) -> str:
        return f"[{', '.join(self.shape)}]"


class Count(NamedTuple):
    """An integer >= 0: how many entries each sample of the result has. Python functions take a Budget."""


class AtLeast(NamedTuple):
    """An integer >= low that is no size of a result."""

    low: int


class Number(NamedTuple):
    """A real number in [low, high], or in (low, high] with `above`. NaN is outside."""

    low: float
    high: float = float("inf")
    above: bool = False


class Choice(NamedTuple):
    """One of some words, or with `joined` several of them joined by "+"; or one that is joined to no other."""

    words: tuple[str, ...]
    joined: bool = False
    alone: str = ""

    @property
    def text(self) -> str:
        expected = f"be one of {', '.join(self.words)}"
        if self.joined:
            expected += ", or several joined by +"
        return f"{expected}, or {self.alone} alone" if self.alone else expected


Kind = TensorKind | Count | AtLeast | Number | Choice


def floats(shape: str, like: str = "") -> TensorKind:
    return TensorKind(tuple(shape.split()), FLOATS, like)


def coordinates(shape: str) -> TensorKind:
    return floats(shape)._replace(coordinates=True)


def integers(shape: str) -> TensorKind:
    return TensorKind(tuple(shape.split()), (torch.int64,))


def indices(shape: str, into: str = "N") -> TensorKind:
    return TensorKind(tuple(shape.split()), (torch.int64,), listed=into)


def flags(shape: str) -> TensorKind:
    return TensorKind(tuple(shape.split()), (torch.bool,))


class Output(NamedTuple):
    """A result: `score` (float32, float64 for a float64 first tensor), `value` (of the first tensor's dtype), `index`
    (-1 padded) or `count` (both int64)."""

    kind: str
    shape: str | Callable[..., list[int]]  # letters, or a function of the letters' sizes and all arguments by name
    ascending: bool = True  # indices: by token; False: in the order of selection


def scores(shape: str | Callable[..., list[int]]) -> Output:
    return Output("score", shape)


def values(shape: str) -> Output:
    return Output("value", shape)


def picks(shape: str, ascending: bool = True) -> Output:
    return Output("index", shape, ascending)


def counts(shape: str) -> Output:
    return Output("count", shape)


class Sharding(NamedTuple):
    """One way in which ranks share a call: tensors are split along the dimensions of these letters, and whole if they
    have none. An output without them is `partial` on every rank: the whole is the sum, or the avg, of all."""

    letters: tuple[str, ...]
    partial: str
    only: dict[str, tuple[Any, ...]]  # the values that arguments must have for it; of words joined by "+", each


def along(letters: str, partial: str = "", **only: tuple[Any, ...]) -> Sharding:
    return Sharding(tuple(letters.split()), partial, only)


class Argument(NamedTuple):
    name: str
    type: str  # of the schema
    default: Any  # inspect.Parameter.empty for a required one
    keyword_only: bool
    kind: Kind | None  # None: any value of its type

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def schema(self) -> str:
        if self.required:
            return f"{self.type} {self.name}"
        default = f'"{self.default}"' if isinstance(self.default, str) else self.default
        return f"{self.type} {self.name}={default}"


class Rule(NamedTuple):
    """A condition on several arguments: check(op, sizes, *arguments) raises.

    `cpp` is the call that does the same in C++; `expression`, of the letters, is True where the rule is kept.
    """

    check: Callable[..., None]
    cpp: str = ""
    expression: str = ""


@dataclass(frozen=True, eq=False)
class Op:
    name: str
    arguments: tuple[Argument, ...]
    outputs: dict[str, Output]  # in order; empty for a list of tensors
    backends: tuple[str, ...]  # that have a kernel; elsewhere the reference serves
    work: tuple[str, str] | None  # the argument to blame, and the product of sizes that _checks.MOST_WORK bounds
    rule: Rule | None
    fake: Callable[..., Any] | None  # for outputs that are not of the kinds above
    shardings: tuple[Sharding, ...]  # the batch's first

    @property
    def private(self) -> bool:
        return self.name.startswith("_")

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """The names of what its shapes are made of: the letters of its tensors and its counts, in order."""
        named: list[str] = []
        for a in self.arguments:
            if isinstance(a.kind, TensorKind):
                named += [letter for letter in a.kind.shape if not letter.isdigit()]
            elif isinstance(a.kind, Count):
                named.append(a.name)
        return tuple(dict.fromkeys(named))

    @cached_property
    def schema(self) -> str:
        positional = [a.schema for a in self.arguments if not a.keyword_only]
        keywords = [a.schema for a in self.arguments if a.keyword_only]
        if not self.outputs:
            returns = "Tensor[]"
        elif len(self.outputs) == 1:
            returns = "Tensor"
        else:
            returns = f"({', '.join(f'Tensor {name}' for name in self.outputs)})"
        return f"({', '.join([*positional, *(['*', *keywords] if keywords else [])])}) -> {returns}"

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The values of all arguments in the order of the schema."""
        rest = self.arguments[len(args) :]
        return [*args, *(kwargs.get(a.name, a.default) for a in rest)]


OPS: dict[str, Op] = {}  # by name, private ones too; filled by importing tokenprune_kernels.ops


def public_ops() -> tuple[str, ...]:
    return tuple(name for name, op in OPS.items() if not op.private)


def compiled_ops() -> tuple[str, ...]:
    """The ops that the compiled library defines, private ones too."""
    return tuple(name for name, op in OPS.items() if set(COMPILED) & set(op.backends))


def op(**description: Any) -> Callable[[F], F]:
    """Describe the op that the function below calls; the keywords are those of `describe`."""

    def register(function: F) -> F:
        OPS[function.__name__] = describe(function, **description)
        return function

    return register


def describe(
    function: Callable[..., Any],
    *,
    returns: Output | dict[str, Output],
    backends: tuple[str, ...] = (),
    work: tuple[str, str] | None = None,
    rule: Rule | None = None,
    fake: Callable[..., Any] | None = None,
    shardings: tuple[Sharding, ...] = (),
    **kinds: Kind,
) -> Op:
    """The description of a function; the keywords are its arguments' kinds.

    shardings: besides the batch, along which every op may be split.
    """
    name = function.__name__
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in PYTHON_ONLY]
    unknown = kinds.keys() - {p.name for p in parameters}
    if unknown:
        raise TypeError(f"@op: {name} has no argument {', '.join(sorted(unknown))}")

    def argument(p: inspect.Parameter) -> Argument:
        kind = kinds.get(p.name)
        default = inspect.Parameter.empty if isinstance(kind, Count) else p.default  # an op has to be told the count
        return Argument(p.name, _SCHEMA_TYPES[p.annotation], default, p.kind is p.KEYWORD_ONLY, kind)

    return Op(
        name,
        tuple(map(argument, parameters)),
        {name: returns} if isinstance(returns, Output) else returns,
        backends,
        work,
        rule,
        fake,
        (along("B"), *shardings),
    )
