"""What a method is: its functions, where each of them chooses, and what it asks for by the names of its parameters."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ._common import Selection

# Called with keywords only: `k` and what it asks for.
Choose = Callable[..., Selection | Tensor]

# What a function may ask for by the name of a parameter, in the sizes B: samples, V: visual tokens of the longest
# sample, L: columns of the prompt, T: columns from the first text behind the images on, C: channels. First what a
# choice can be based on, then which rows, keys and tokens of it are real.
EVIDENCE = {
    "query": "[B, Hq, T, D]: queries of the attention in the layer before, of the text behind the images",
    "key": "[B, Hkv, L, D]: keys of the attention in the layer before, of the whole prompt",
    "next_query": "[B, Hq, T, D]: `query` of the attention in the layer that comes, made by its own projections",
    "next_key": "[B, Hkv, L, D]: `key` of the attention in the layer that comes, made by its own projections",
    "features": "[B, V, C]: hidden states of the visual tokens; in front of the language model, the projector's output",
    "visual_embeddings": "[B, V, C]: another name of `features`",
    "unrotated_key": "[B, V, Hkv * D]: `k_proj` of `features` in the layer that comes, without norm and rotation",
    "text_embeddings": "[B, T, C]: hidden states of the text behind the images",
    "input_features": "[B, U, C]: what went into the first decoder layer at all U visual tokens of the prompt",
    "input_text": "[B, T, C]: what went into the first decoder layer at the text behind the images",
    "saliency": "[B, V] float32: how salient each visual token is to the vision tower",
    "positions": "[B, V, 2] float32: row and column on the token's own grid",
    "grid": "[B, V, 2] float32: height and width of that grid",
    "groups": "[B, V] int64: crop or frame of a token, numbered through the sample",
    "stacked_positions": "[B, V, 3] float32: `positions`, and crops along a third axis, the largest diagonal apart",
    "generator": "torch.Generator of `seed=`, or None without a seed",
}
EXTENT = {
    "mask": "[B, V] bool: False behind the last visual token of a sample; None when all have V",
    "present": "[B, V] bool: `mask` that is never None",
    "n": "int: V",
    "count": "int: the visual tokens of every sample of the call; samples with other numbers are calls of their own",
    "input_mask": "[B, U] bool: False behind the last visual token of a prompt; None when all have U",
    "text_mask": "[B, T] bool: which rows are text behind the last image of their sample; at least the last real one",
    "key_indices": "[B, V] int64: the column of each visual token, -1 behind the last",
    "query_positions": "[B, T] int64: the column of each query row",
    "query_mask": "[B, T] bool: `text_mask`",
    "key_mask": "[B, L] bool: False for padding; None when there is none",
    "causal": "bool: whether a query row sees no token behind its own; False where a prompt is a prefix (PaliGemma)",
    "layout": 'str: "bhld", the order of dimensions of `query` and `key`',
    "scale": "float: what the attention multiplies its products by",
    "next_scale": "float: `scale` of the attention in the layer that comes",
    "lse": "[B, Hq, T] log-sum-exp of the query rows; None unless the attention gives it",
}
ARGUMENTS = EVIDENCE | EXTENT
# Known only behind a decoder layer whose attention was watched.
ATTENTION = frozenset({"query", "key", "scale", "lse"})
# Made of the hidden states in front of a decoder layer, by that layer.
PROJECTED = frozenset({"next_query", "next_key", "next_scale"})


def name_of(function: Choose) -> str:
    """What a function is called in messages."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


@dataclass(frozen=True)
class Stage:
    """One function of a method, and where it chooses.

    function: is called without gradients, with keywords only: `k`, the tokens to keep, and one for every parameter
        whose name is in `ARGUMENTS`; other parameters are options of the user. It returns int64 indices [B, k] of
        distinct visual tokens of each sample, on the device of its inputs: a Tensor in any order, or a `Selection`,
        whose indices are ascending. Samples that keep different numbers are calls of their own, so that every sample
        of a call has at least k visual tokens.
    where: "model", in front of the language model; "layer", in front of a decoder layer; None: the latter when
        `layer=` is given.
    needs: names in `ARGUMENTS` of a function whose signature does not show them; or {parameter: name}, for a parameter
        called otherwise. A name of None withholds a parameter from the user too.
    share: keeps so many times the budget.
    optional: names in `ARGUMENTS` of what it also chooses without: where there is no question, text has no rows.
    """

    function: Choose
    where: str | None = None
    needs: Mapping[str, str | None] | Collection[str] = ()
    share: int = 1
    optional: Collection[str] = ()

    def __post_init__(self) -> None:
        called = f"method {self.name}"
        if not callable(self.function):
            raise TypeError(f"{called}: the function must be callable, got {type(self.function).__name__}")
        if self.where not in (None, "model", "layer"):
            raise ValueError(f"{called}: stage must be model, layer or None, got {self.where!r}")
        for field_name, names in (("needs", self.uses), ("optional", self.optional)):
            unknown = sorted(set(names) - set(ARGUMENTS))
            if unknown:
                raise ValueError(f"{called}: {field_name} must be of {', '.join(ARGUMENTS)}, got {unknown[0]!r}")
        kinds = {p.kind for p in self._parameters.values()}
        if "k" not in self._parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise TypeError(f"{called}: the function must take k, the number of tokens to keep")
        attention = sorted(self.uses & ATTENTION)
        if attention and self.where == "model":
            raise ValueError(
                f"{called}: asks for {', '.join(attention)} of the attention in the layer before, and there is none in "
                "front of the language model; make its stage layer"
            )

    @property
    def name(self) -> str:
        return name_of(self.function)

    @functools.cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        try:
            return dict(inspect.signature(self.function).parameters)
        except (TypeError, ValueError):  # some functions of C have none: they take what they are said to need
            return {"given": inspect.Parameter("given", inspect.Parameter.VAR_KEYWORD)}

    @functools.cached_property
    def _needs(self) -> dict[str, str | None]:
        return dict(self.needs) if isinstance(self.needs, Mapping) else {name: name for name in self.needs}

    @functools.cached_property
    def arguments(self) -> dict[str, str]:
        """Its parameters that are given to it, with the names in `ARGUMENTS` of what they are given."""
        bound = self.function.keywords if isinstance(self.function, functools.partial) else {}
        named = {name: name for name in self._parameters if name in ARGUMENTS and name not in bound}
        return {name: source for name, source in {**named, **self._needs}.items() if source is not None}

    @functools.cached_property
    def options(self) -> dict[str, bool]:
        """Its parameters that are the user's, with whether they have a default."""
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        own = {"k", *self.arguments, *self._needs}
        return {
            name: p.default is not inspect.Parameter.empty
            for name, p in self._parameters.items()
            if name not in own and p.kind not in variadic
        }

    @property
    def reads_attention(self) -> bool:
        """Whether the attention in the layer before has to be watched."""
        return bool(self.uses & ATTENTION)

    @property
    def projects(self) -> bool:
        """Whether the layer that comes has to make its queries and keys in advance."""
        return bool(self.uses & PROJECTED)

    def at_layer(self, layer: int | None) -> bool:
        """Whether it chooses in front of a decoder layer; `layer` is the user's."""
        return self.where == "layer" or self.reads_attention or (self.where is None and layer is not None)

    @property
    def uses(self) -> frozenset[str]:
        """The names in `ARGUMENTS` of all that it is given."""
        return frozenset(self.arguments.values())


@dataclass(frozen=True)
class Method:
    """A way to choose visual tokens, described once: tables, command lines, benchmarks and tests follow from it.

    stages: in the order of the model; several when tokens are dropped at several depths.
    title, summary: the name in its paper, and one line that says by what it chooses.
    paper, authors: arXiv id, and who wrote it, in the form of BibTeX, where that is known.
    source, baseline: what this implementation is faithful to; whether papers compare themselves with it.
    layer, layers: the decoder layer in front of which the paper prunes, and that of families where it is another one.
    schedule: the paper's shares by decoder layer, of a model with `depth` layers, when it prunes several times inside.
    positions: the paper's handling of the rotary positions of what stays, "original" or "renumber".
    within_images: whether it means something to choose from one image or frame alone.
    """

    name: str
    stages: tuple[Stage, ...]
    title: str = ""
    summary: str = ""
    paper: str = ""
    authors: str = ""
    source: str = ""
    baseline: bool = False
    layer: int = 2
    layers: Mapping[str, int] = field(default_factory=dict)
    schedule: Mapping[int, float] = field(default_factory=dict)
    depth: int = 32
    positions: str = "original"
    within_images: bool = True

    def __post_init__(self) -> None:
        if self.positions not in ("original", "renumber"):
            raise ValueError(f"method {self.name}: positions must be original or renumber, got {self.positions!r}")
        where = [stage.where for stage in self.stages]
        if len(where) != 1 and where != ["model", "layer"]:
            raise ValueError(f"method {self.name}: several stages are one of model and one of layer, got {where}")

    def scheduled(self, depth: int) -> dict[int, float]:
        """The schedule in a model of `depth` layers: at the same parts of it, but never in front of layer 0. Where two
        of the paper's layers become one, the later one counts."""
        return {max(1, layer * depth // self.depth): share for layer, share in self.schedule.items()}

    @property
    def in_model(self) -> bool:
        """Whether it prunes in front of a decoder layer, whether or not the user names one."""
        return any(stage.at_layer(None) for stage in self.stages)

    @property
    def uses(self) -> frozenset[str]:
        """The names in `ARGUMENTS` of all that its stages are given."""
        return frozenset().union(*(stage.uses for stage in self.stages))
