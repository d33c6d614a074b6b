"""How the functions of the methods may be called: a budget as the ops take it, and errors that name the argument."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from .._checks import check_tensor, complain, shape_text
from .._convert import as_kind, budget, by_budget, samples_of
from .._op import Argument, TensorKind
from ._common import Selection
from ._method import ARGUMENTS

P = ParamSpec("P")

# What no model of the integration has.
_OWN = {"image_embeddings": "[B, V, E]", "importance": "[B, V]", "keys": "[B, V, E]"}
# Whose size says how many visual tokens there are: the first that is given.
_OVER_TOKENS = ("features", "visual_embeddings", "key_indices")


def _kind(said: str) -> TensorKind:
    """Of "[B, V] int64: ..." in `ARGUMENTS`. Other dtypes, and how sizes agree, are left to the ops."""
    shape, _, dtype = said.partition(":")[0].partition("]")
    letters = ("P" if letter.isdigit() else letter for letter in shape.removeprefix("[").split(", "))
    return TensorKind(tuple(letters), {" int64": (torch.int64,), " bool": (torch.bool,)}.get(dtype, ()))


_KINDS = {
    name: _kind(said)._replace(coordinates=name == "positions")
    for name, said in (ARGUMENTS | _OWN).items()
    if said.startswith("[") and name != "grid"
}


def called_like_ops(function: Callable[P, Selection]) -> Callable[P, Selection]:
    """A method's function, which has no gradient and gets `k` as an int.

    Samples that keep different numbers are calls of their own. Where the function fails, its arguments are looked at:
    an error of the third line of a formula would not say which of them is wrong.
    """
    name = function.__name__
    signature = inspect.signature(function)
    at = list(signature.parameters).index("k")
    masks = tuple(p for p in signature.parameters if p.endswith("mask"))

    @functools.wraps(function)
    @torch.no_grad()
    def run(*args: P.args, **kwargs: P.kwargs) -> Selection:
        for mask in masks:
            given = kwargs.get(mask)
            if isinstance(given, Tensor) and given.dtype is not torch.bool:
                _check_tensors(signature, name, {mask: given})
        k = kwargs["k"] if "k" in kwargs else args[at] if at < len(args) else 0
        if not isinstance(k, (int, torch.SymInt)):
            arguments = signature.bind(*args, **kwargs).arguments
            _check_tensors(signature, name, arguments)
            return _with_budget(function, arguments)
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            _check_tensors(signature, name, signature.bind_partial(*args, **kwargs).arguments)
            raise

    return run


def _check_tensors(signature: inspect.Signature, method: str, arguments: dict[str, Any]) -> None:
    """Those that are tensors or should be."""
    for name, value in arguments.items():
        if name in _KINDS:
            check_argument(method, name, value, signature.parameters[name].default)


def check_argument(method: str, name: str, value: Any, default: Any) -> None:
    """By itself: that it is a tensor, its dtype, and how many dimensions it has."""
    if value is None and default is None:
        return
    kind = _KINDS[name]
    given = as_kind(kind, value, 1) if isinstance(value, Tensor) else value
    check_tensor(method, Argument(name, "Tensor", default, True, kind), kind, given, {}, None)


def _with_budget(function: Callable[..., Selection], arguments: dict[str, Any]) -> Selection:
    name = function.__name__
    tensors = {
        n: t
        for n, t in arguments.items()
        if isinstance(t, Tensor) and n != "k" and not (n == "positions" and t.dim() == 2)  # those of every sample
    }
    batch = next((t.shape[0] for t in tensors.values()), None)
    k = budget(name, "k", arguments["k"], _tokens(tensors, arguments.get("layout")), batch)
    if not isinstance(k, list):
        return function(**{**arguments, "k": k})
    for n, t in tensors.items():
        if t.shape[0] != batch:
            complain(ValueError, name, n, f"have one entry per sample (B = {batch})", shape_text(t))

    def of_samples(k: int, samples: list[int]) -> Selection:
        return function(**{**arguments, **{n: samples_of(t, samples) for n, t in tensors.items()}, "k": k})

    selection: Selection = by_budget(k, of_samples)
    return selection


def _tokens(tensors: dict[str, Tensor], layout: str | None) -> int | None:
    """V of the call."""
    for name in _OVER_TOKENS:
        if name in tensors:
            return tensors[name].shape[1]
    return tensors["key"].shape[1 if layout == "blhd" else 2]
