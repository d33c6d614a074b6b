"""How the functions of the methods may be called: a budget as the ops take it, and errors that name the argument."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from .. import _advice
from .._checks import complain, dtype_name, shape_text
from .._convert import budget, by_budget
from .._op import INDEX_DTYPES
from ._common import Selection
from ._method import ARGUMENTS

P = ParamSpec("P")

# What no model of the integration has.
_OWN = {"image_embeddings": "[B, V, E]", "importance": "[B, V]", "keys": "[B, V, E]"}
# Whose size says how many visual tokens there are: the first that is given.
_OVER_TOKENS = ("features", "visual_embeddings", "key_indices")


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
                instead = _advice.of_dtype(mask, torch.bool, given)
                complain(TypeError, name, mask, "be bool", dtype_name(given.dtype), instead)
        k = kwargs["k"] if "k" in kwargs else args[at] if at < len(args) else 0
        if not isinstance(k, (int, torch.SymInt)):
            arguments = signature.bind(*args, **kwargs).arguments
            _check_shapes(signature, name, arguments)
            return _with_budget(function, arguments)
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            _check_shapes(signature, name, signature.bind_partial(*args, **kwargs).arguments)
            raise

    return run


def _check_shapes(signature: inspect.Signature, method: str, arguments: dict[str, Any]) -> None:
    """Tensors are tensors with as many dimensions as `ARGUMENTS` says; positions [V, P] are those of every sample."""
    for name, value in arguments.items():
        said = (_OWN.get(name) or ARGUMENTS.get(name, "")).partition(":")[0]
        if name == "grid" or not said.startswith("["):
            continue
        required = signature.parameters[name].default is inspect.Parameter.empty
        if value is None and not required:
            continue
        if not isinstance(value, Tensor):
            expected = "be a tensor" if required else "be a tensor or None"
            complain(TypeError, method, name, expected, type(value).__name__, _advice.of_value(name, value))
        if said.endswith(" int64") and value.dtype not in INDEX_DTYPES:
            instead = _advice.of_dtype(name, torch.int64, value)
            complain(TypeError, method, name, "be int64", dtype_name(value.dtype), instead)
        shape = said[: said.index("]") + 1]
        rank = shape.count(",") + 1
        if value.dim() != rank and not (name == "positions" and value.dim() == 2):
            instead = _advice.of_shape(name, [-1] * rank, value, True)
            complain(ValueError, method, name, f"have shape {shape}", shape_text(value), instead)


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
        return function(**{**arguments, **{n: t[samples] for n, t in tensors.items()}, "k": k})

    selection: Selection = by_budget(k, of_samples)
    return selection


def _tokens(tensors: dict[str, Tensor], layout: str | None) -> int | None:
    """V of the call."""
    for name in _OVER_TOKENS:
        if name in tensors:
            return tensors[name].shape[1]
    return tensors["key"].shape[1 if layout == "blhd" else 2]
