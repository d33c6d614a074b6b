"""Watching methods of one module: what they are called with, and what is called inside."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .calls import Asked, Calls
from .copies import instead_of, ours
from .families import Inputs

# around(the method, its positional arguments, its keyword arguments) -> what the caller gets
Around = Callable[[Callable[..., Any], tuple[Any, ...], Inputs], Any]


class Watch:
    """For the time of a block, calls of `module.name` go through `around`.

    The method is shadowed by an attribute of this one instance, of the same signature, since generate reads that.
    """

    def __init__(self, module: nn.Module, name: str, around: Around) -> None:
        self._module, self._name, self._around = module, name, around
        self._shadow: Any = None

    def install(self) -> None:
        method, around = getattr(self._module, self._name), self._around

        # torch.compile goes on inside of the method, and leaves to Python what is remembered around it.
        @functools.partial(torch.compiler.disable, recursive=False)
        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            return around(method, args, kwargs)

        attributes = vars(self._module)
        before = [attributes[self._name]] if self._name in attributes else []
        self._shadow = attributes[self._name] = ours(watched, *before)

    def remove(self) -> None:
        attributes = vars(self._module)
        # Not if somebody has put another in front since: theirs calls ours, which still works.
        if self._shadow is not None and attributes.get(self._name) is self._shadow:
            del attributes[self._name]
            attributes.update((self._name, before) for before in instead_of(self._shadow) or [])
        self._shadow = None


def watches_of(
    model: Any, core: Any, calls: Calls, watched: dict[str, Callable[[Inputs], Any]], before: Callable[[], None]
) -> list[Watch]:
    """The watches of a block: on generate, on what encodes pictures, and on the family's watched methods.

    before: is called before pictures are encoded.
    """

    def note(name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> None:
        here = calls.pictures
        if here is not None and name in watched:
            given = inspect.signature(method).bind(*args, **kwargs).arguments
            here.arguments[name] = watched[name]({**given, **given.get("kwargs", {})})

    def watch(name: str) -> Watch:
        def around(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
            note(name, method, args, kwargs)
            return method(*args, **kwargs)

        def encode(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
            before()
            with calls.encoding() as pictures:
                features = around(method, args, kwargs)
            pictures.left_on(features)
            return features

        return Watch(core, name, encode if name in _ENCODERS else around)

    def generate(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        with calls.generating(_asked(model, {**given, **given.get("kwargs", {})})):
            return method(*args, **kwargs)

    watches = [watch(name) for name in dict.fromkeys([*_ENCODERS, *watched]) if hasattr(core, name)]
    return [*watches, Watch(model, "generate", generate)] if hasattr(model, "generate") else watches


_ENCODERS = ("get_image_features", "get_video_features")


def _asked(model: Any, given: Inputs) -> Asked:
    """As generate finds it out: from its keywords, the configuration it is given, and the model's."""
    config = copy.copy(given.get("generation_config") or model.generation_config)
    for others in ({n: v for n, v in vars(model.generation_config).items() if vars(config).get(n) is None}, given):
        vars(config).update((name, value) for name, value in others.items() if name in vars(config))
    mode = config.get_generation_mode(given.get("assistant_model"))
    return Asked(assisted="assisted" in str(mode.value), chunk=config.prefill_chunk_size)
