"""Runs the kernels with mistakes, emulator/broken, in every order in which the emulator can run threads and blocks."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor


def run(
    broken: ModuleType, name: str, given: Tensor | None = None, out: Tensor | None = None, variant: int = 0,
    blocks: int = 1, block: tuple[int, int, int] = (32, 1, 1), shared: int = 0, cluster: int = 1,
    cooperative: bool = False,
) -> Tensor | None:  # fmt: skip
    status = broken.run(
        name, blocks, block, shared, cluster, cooperative,
        given.data_ptr() if given is not None else 0, out.data_ptr() if out is not None else 0, variant,
    )  # fmt: skip
    assert status == "cudaSuccess"
    return out


def schedules(broken: ModuleType) -> Iterator[None]:
    """Sets one schedule after the other."""
    kinds, settings = broken.Schedule, broken.settings()
    for settings.schedule, settings.seed in [
        (kinds.forward, 0),
        (kinds.reversed, 0),
        *((kinds.shuffled, s) for s in range(4)),
    ]:
        yield


def in_all_schedules(broken: ModuleType, *args: Any, **kwargs: Any) -> list[Tensor]:
    results = []
    for _ in schedules(broken):
        out = kwargs["out"].clone()
        run(broken, *args, **{**kwargs, "out": out})
        results.append(out)
    return results
