"""Whether the engine's functions are those that the plug-in knows: by their signatures, never by version numbers."""

import inspect
from collections.abc import Callable
from typing import Any

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(f"tokenprune_kernels: {what}; the plug-in does not know this version of vLLM")


def check_method(owner: type, name: str, *expected: str) -> None:
    """Raises unless the class has a method that takes these arguments, besides self, and others only by default."""
    method: Callable[..., Any] | None = getattr(owner, name, None)
    if not callable(method):
        raise unsupported(f"vLLM's {owner.__name__} has no method {name}")
    parameters = {n: p for n, p in inspect.signature(method).parameters.items() if n != "self"}
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in _VARIADIC]
    if not set(required) <= set(expected) <= set(parameters):
        raise unsupported(
            f"vLLM's {owner.__name__}.{name} takes ({', '.join(parameters)}), not ({', '.join(expected)})"
        )
