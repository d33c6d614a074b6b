"""Copies of a model made inside its block, by copy or pickle, are of the model as it was before the block.

`copy` and `pickle` (and with it torch.save) ask `copyreg` how to take an object of a class apart. While a block is
entered, they are told so for the classes of what it put something into: what is ours is left out.
"""

import copyreg
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from .attention import base_of

# An attribute of every function that a block puts into a module: [what it stands in front of], or [] for nothing.
_INSTEAD_OF = "_tokenprune_instead_of"

_blocks: Counter[type] = Counter()
_others: dict[type, Callable[[Any], Any]] = {}  # what was told to copyreg before, by somebody else
_lock = threading.Lock()


def ours(function: Callable[..., Any], *instead_of: Any) -> Callable[..., Any]:
    setattr(function, _INSTEAD_OF, list(instead_of))
    return function


def instead_of(value: Any) -> list[Any] | None:
    """What a function of a block stands in front of; None for any other value."""
    found: list[Any] | None = getattr(value, _INSTEAD_OF, None)
    return found


def leave_out_of_copies(classes: Iterable[type]) -> Callable[[], None]:
    """Copies of these classes lack what is ours, until the function that is returned is called."""
    classes = set(classes)
    with _lock:
        for cls in classes - set(_blocks):
            if cls in copyreg.dispatch_table:
                _others[cls] = copyreg.dispatch_table[cls]
            copyreg.pickle(cls, _taken_apart)
        _blocks.update(classes)

    def undo() -> None:
        with _lock:
            _blocks.subtract(classes)
            for cls in [cls for cls in classes if not _blocks[cls]]:
                del _blocks[cls]
                if cls in _others:
                    copyreg.dispatch_table[cls] = _others.pop(cls)
                else:
                    copyreg.dispatch_table.pop(cls, None)

    return undo


def _taken_apart(value: Any) -> Any:
    before = _others.get(type(value))
    parts: Any = value.__reduce_ex__(4) if before is None else before(value)
    if not isinstance(parts, tuple) or len(parts) < 3 or not isinstance(parts[2], dict):
        return parts
    return *parts[:2], _without_ours(parts[2]), *parts[3:]


def _without_ours(state: dict[str, Any]) -> dict[str, Any]:
    # Hooks are in dictionaries by number; which of them take keywords is in others, by the same numbers.
    by_number = {name: value for name, value in state.items() if "hooks" in name and isinstance(value, dict)}
    numbers = {n for hooks in by_number.values() for n, hook in hooks.items() if instead_of(hook) is not None}
    clean: dict[str, Any] = {}
    for name, value in state.items():
        before = instead_of(value)
        if name in by_number:
            clean[name] = type(value)((number, hook) for number, hook in value.items() if number not in numbers)
        elif before is not None:
            clean.update((name, other) for other in before)
        else:
            clean[name] = base_of(value) if isinstance(value, str) else value
    return clean
