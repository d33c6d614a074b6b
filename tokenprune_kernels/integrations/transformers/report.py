"""What a prefill leaves behind for the user: the kept tokens, their layout, counts and times."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .saved import Told


class Clock:
    """The time between `start` and `stop` on the device of the work; reading it waits for a GPU, starting does not."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = torch.cuda if device.type == "cuda" else None
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None

    def _now(self) -> Any:
        if self._gpu is None:
            return time.perf_counter()
        event = self._gpu.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *exception: object) -> None:
        self._spans.append((self._began, self._now()))

    def milliseconds(self) -> float:
        if self._gpu is None:
            return float(sum(end - began for began, end in self._spans) * 1e3)
        self._gpu.synchronize()
        return float(sum(began.elapsed_time(end) for began, end in self._spans))


class Report:
    """What is reported of one prefill; without arguments, of none yet."""

    def __init__(
        self,
        device: torch.device | None = None,
        tokens: list[int] | None = None,
        layout: Callable[[], Layout] | None = None,
    ) -> None:
        self.kept: Tensor | None = None
        self.kept_at: dict[int, Tensor] = {}
        self.told_at: dict[int, list[Told]] = {}
        self.before = tokens or []  # visual tokens of each sample
        self.layout = layout  # made when it is asked for
        self.prefills = 0  # of the block, with this one
        self._facts: dict[str, Any] = {}
        self._clocks: dict[str, Clock] = {}
        if device is not None:
            self._facts = {"before": tokens, "after": tokens, "layers": [], "backend": None}
            self._clocks = {"select_ms": Clock(device), "compact_ms": Clock(device)}

    def pruned(self, layer: int, after: list[int], kept: Tensor, backend: str, told: list[Told]) -> None:
        self.kept = self.kept_at[layer] = kept
        self.told_at[layer] = told
        self._facts["after"] = after
        self._facts["layers"] = [*self._facts["layers"], layer]
        self._facts["backend"] = backend

    def shown(self) -> tuple[Layout, Tensor]:
        """Where the visual tokens lie, and which were kept."""
        if self.kept is None or self.layout is None:
            raise RuntimeError("prune_visual_tokens: nothing was pruned yet")
        return self.layout(), self.kept

    def untouched(self, kept: Tensor) -> None:
        self.kept = kept

    def clock(self, name: str) -> Clock:
        return self._clocks[name]

    def stats(self) -> dict[str, Any]:
        times = {name: clock.milliseconds() for name, clock in self._clocks.items()}
        return {"prefills": self.prefills, **self._facts, **times}
