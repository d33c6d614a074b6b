"""Watching a method of one module: what it was called with last."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Watch:
    """For the time of a block, calls of `module.name` leave `what(arguments by name)` in `last`.

    The method is shadowed by an attribute of this one instance, of the same signature, since generate reads that.
    """

    def __init__(self, module: nn.Module, name: str, what: Callable[[dict[str, Any]], Any]) -> None:
        self.name = name
        self.last: Any = None
        self._module, self._what = module, what
        self._shadow: Any = None
        self._shadowed: list[Any] = []  # an attribute of the instance that was there before, if any

    def install(self) -> None:
        method = getattr(self._module, self.name)
        signature = inspect.signature(method)

        def remember(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = signature.bind(*args, **kwargs).arguments
            self.last = self._what({**bound, **bound.get("kwargs", {})})

        remember = torch.compiler.disable(remember)

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            remember(args, kwargs)
            return method(*args, **kwargs)

        attributes = vars(self._module)
        self._shadowed = [attributes[self.name]] if self.name in attributes else []
        self._shadow = attributes[self.name] = watched

    def remove(self) -> None:
        attributes = vars(self._module)
        # Not if somebody has put another in front since: theirs calls ours, which still works.
        if self._shadow is not None and attributes.get(self.name) is self._shadow:
            del attributes[self.name]
            for before in self._shadowed:
                attributes[self.name] = before
        self._shadow = self.last = None
