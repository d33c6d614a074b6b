"""Which of our ops a piece of code calls, and with which arguments."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

OpCall = tuple[str, tuple[Any, ...], dict[str, Any]]


class OpCalls(TorchDispatchMode):
    """Remembers the calls of our ops inside its block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[OpCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "tokenprune":
            self.found.append((name, args, kwargs or {}))
        return func(*args, **(kwargs or {}))
