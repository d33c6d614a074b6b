"""The checks of checks.py on the shapes that are timed: there the launches have the grids of real use."""

from collections.abc import Callable

import torch

from . import checks
from .device import Device
from .rows import Row, all_rows
from .samples import require
from .work import Item

REPEATS, DRY_REPEATS = 50, 3


def items(device: Device, toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    repeats = DRY_REPEATS if toy else 10 if quick else REPEATS

    def run(row: Row) -> Item:
        """All checks of one row: its inputs are made once."""
        found = require(device, *row.ops)
        with torch.inference_mode():
            inputs, others = (row.make(device.torch_device, seed) for seed in (0, 1))
            row.check(device, inputs, row.ours(inputs))
            checks.inputs_unchanged(device, row.ours, inputs)
            checks.determinism(device, row.ours, inputs, repeats)
            checks.no_waiting(device, row.ours, inputs)
            checks.streams(device, row.ours, inputs, others)
            checks.graph(device, row.ours, inputs, others)
        return {**found, "repeats": repeats}

    return {row.name: lambda row=row: run(row) for row in all_rows(device, toy)}
