"""Watching methods of one module: what they are called with, and what is called inside."""

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .calls import Calls
from .copies import ours
from .encoding import Asked
from .families import Family, Inputs, Model

# around(the method, its positional arguments, its keyword arguments) -> what the caller gets
Around = Callable[[Callable[..., Any], tuple[Any, ...], Inputs], Any]


def shadow(module: nn.Module, name: str, around: Around) -> Callable[[], None]:
    """Calls of `module.name` go through `around`, until the function that is returned is called.

    The method is shadowed by an attribute of this one instance, of the same signature, since generate reads that.
    """
    method = getattr(module, name)

    # torch.compile goes on inside of the method, and leaves to Python what is remembered around it.
    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return around(method, args, kwargs)

    before = {name: vars(module)[name]} if name in vars(module) else {}
    put = vars(module)[name] = ours(watched, *before.values())

    def remove() -> None:
        # Somebody may have put another in front since, which stays: it calls ours, which still works.
        if vars(module).get(name) is put:
            del vars(module)[name]
            vars(module).update(before)

    return remove


def watch(
    installed: ExitStack, model: Model, core: Model, calls: Calls, family: Family, before: Callable[[], None]
) -> None:
    """Watches generate, what encodes images, and the family's watched methods, until `installed` is closed.

    before: is called before images are encoded.
    """

    def note(name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        here = calls.encoding
        if here is not None and name in family.watched:
            here.arguments[name] = family.watched[name](_given(method, args, kwargs))
        return method(*args, **kwargs)

    def encode(name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        before()
        with calls.encode() as encoding:
            features = note(name, method, args, kwargs)
        encoding.left_on(features)
        return features

    def generate(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        with calls.generating(_asked(model, _given(method, args, kwargs))):
            return method(*args, **kwargs)

    for name in dict.fromkeys([*family.encoders, *family.watched]):
        if not hasattr(core, name):
            raise NotImplementedError(
                f"prune_visual_tokens: {type(core).__name__} has no {name}; this version of transformers is not "
                "supported"
            )
        installed.callback(shadow(core, name, functools.partial(encode if name in family.encoders else note, name)))
    if hasattr(model, "generate"):
        installed.callback(shadow(model, "generate", generate))


def _given(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
    """The arguments of a call by name, those in **kwargs among them."""
    given = inspect.signature(method).bind(*args, **kwargs).arguments
    return {**given, **given.get("kwargs", {})}


def _asked(model: Model, given: Inputs) -> Asked:
    """What generate is asked for by its keywords, the configuration it is given, and the model's, in this order."""
    config = copy.copy(given.get("generation_config") or model.generation_config)
    for others in ({n: v for n, v in vars(model.generation_config).items() if vars(config).get(n) is None}, given):
        vars(config).update((name, value) for name, value in others.items() if name in vars(config))
    mode = config.get_generation_mode(given.get("assistant_model"))
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    return Asked(assisted="assisted" in str(mode.value), chunk=config.prefill_chunk_size, copies=copies)
