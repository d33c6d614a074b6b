"""What a prefill leaves behind for the user: the kept tokens, their layout, counts and times."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .saved import Told


class Clock:
    """The time that blocks take on a device; reading it waits for a GPU, a block does not."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None

    def _now(self) -> Any:
        if self._gpu is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))  # the current GPU may be another one
        return event

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *exception: object) -> None:
        self._spans.append((self._began, self._now()))

    def milliseconds(self) -> float:
        if self._gpu is None:
            return float(sum(end - began for began, end in self._spans) * 1e3)
        torch.cuda.synchronize(self._gpu)
        return float(sum(began.elapsed_time(end) for began, end in self._spans))


class Report:
    """What is reported of one prefill; without arguments, of none yet."""

    def __init__(self, tokens: list[int] | None = None, layout: Callable[[], Layout] | None = None) -> None:
        self.kept: Tensor | None = None
        self.kept_at: dict[int, Tensor] = {}
        self.told_at: dict[int, list[Told]] = {}
        self.before = tokens or []  # visual tokens of each sample
        self.layout = layout  # made when it is asked for
        self.prefills = 0  # of the block, with this one
        self._facts: dict[str, Any] = {}
        self._clocks: dict[str, list[Clock]] = {}
        if tokens is not None:
            self._facts = {"before": tokens, "after": tokens, "layers": [], "backend": None}
            self._clocks = {"select_ms": [], "compact_ms": []}

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

    def clock(self, name: str, device: torch.device) -> Clock:
        """For one part of the time of this name, on the device that does the work."""
        self._clocks[name].append(made := Clock(device))
        return made

    def stats(self) -> dict[str, Any]:
        times = {name: float(sum(part.milliseconds() for part in parts)) for name, parts in self._clocks.items()}
        return {"prefills": self.prefills, **self._facts, **times}
