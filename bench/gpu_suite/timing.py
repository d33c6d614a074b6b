"""The stages that go through the rows: right and how fast, what the contract promises of the calls, other packages."""

from collections.abc import Callable
from typing import Any

import torch

import tokenprune_kernels as tp
from bench.gpu_timer import input_sets, measure, ratios, seconds_of
from bench.rows import Row, Scale, normal, on
from bench.rows.peers import PEERS, Peer, peers_of
from testing import gpu_checks
from testing.gpu_checks import Function, Inputs, agreement, tensors
from testing.gpu_device import Device
from testing.gpu_samples import require
from tokenprune_kernels._backend import served_by

from .work import Item

REPEATS, DRY_REPEATS = 50, 2  # of a determinism check


def attempted(device: Device, f: Callable[[], Item]) -> Item:
    """A competitor that cannot do this shape, or a profiler that is forbidden, loses its own cell only."""
    try:
        return f()
    except Exception as error:
        if device.broken():
            raise
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def described(row: Row) -> Item:
    """What the report needs of a row."""
    names = ("bytes", "flops", "steps", "targets", "max_launches", "max_microseconds", "min_floor_share", "note")
    return {"dtype": str(row.dtype).removeprefix("torch."), **{name: getattr(row, name) for name in names}}


def checked(row: Row, x: Inputs, result: Any) -> dict[str, float]:
    assert row.check is not None, f"{row.name} has no check"
    return row.check(x, result)


def time_in_turn(device: Device, row: Row, functions: dict[str, Function], seconds: float) -> Item:
    """Check, then time in turn. An op whose result is wrong raises here and is not timed."""
    found: Item = {"row": described(row), **require(device, *row.ops)}
    ours = device.serve(row.ours, *row.ops)
    with torch.inference_mode():
        inputs = row.make(device.torch_device, 0)
        found["backend"] = served_by(row.ops[0], tensors(inputs)[0]) if device.real else "emulator"
        found["check"] = checked(row, inputs, ours(inputs))
        sets = input_sets(device, row, inputs)
        found["rotated_bytes"] = int(len(sets) * (row.bytes or sum(t.nbytes for t in tensors(inputs))))
        found["times"] = {"ours": measure(device, ours, sets, seconds)}
        for name, f in functions.items():
            graph = name not in row.uncapturable
            found["times"][name] = attempted(device, lambda f=f, graph=graph: measure(device, f, sets, seconds, graph))
        found["launches"] = attempted(device, lambda: device.launches(lambda: ours(inputs)))
    found["ratios"] = ratios(found["times"])
    return found


def peak_memory(device: Device, scale: Scale) -> Item:
    """What a call of the scores holds beyond its inputs, against the logits that eager code stores."""
    found = require(device, "cross_attention_scores")
    heads, key_heads, rows, keys = scale(28, 4), scale(4, 2), scale(2000, 20), scale(16384, 64)
    x = on(
        device.torch_device,
        {"query": normal(0, 1, heads, rows, scale(128, 8), dtype=torch.bfloat16),
         "key": normal(1, 1, key_heads, keys, scale(128, 8), dtype=torch.bfloat16)},
    )  # fmt: skip
    op = device.op("cross_attention_scores")
    logits = heads * rows * keys * 4
    with torch.inference_mode():
        ours = device.peak_bytes(lambda: op(**x))
        eager = device.peak_bytes(lambda: tp.reference.cross_attention_scores(**x))
    share = None if ours is None else ours / logits
    return {**found, "peak_bytes": ours, "eager_peak_bytes": eager, "logits_bytes": logits, "share": share, "max": 0.01}


def items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    seconds = seconds_of(toy, quick)
    return {
        **{row.name: lambda row=row: time_in_turn(device, row, row.others, seconds) for row in rows},
        "peak memory of the scores": lambda: peak_memory(device, Scale(toy)),
    }


def compiled_items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """torch.compile of the references, by itself because compiling takes long."""

    def run(row: Row) -> Item:
        assert row.compile is not None
        torch._dynamo.reset()
        compiled = torch.compile(row.compile, dynamic=False, backend="eager" if toy else "inductor")
        return time_in_turn(device, row, {"torch.compile": lambda x: compiled(**x)}, seconds_of(toy, quick))

    compilable = [row for row in rows if row.compile is not None]
    return {row.name: lambda row=row: run(row) for row in (compilable[:2] if toy else compilable)}


def peer_items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """Other packages on our inputs; one that is not there, or is called otherwise than we know, says so."""

    def run(row: Row, peer: Peer) -> Item:
        call = peer.load()
        with torch.inference_mode():
            inputs = row.make(device.torch_device, 0)
            agreed = agreement(call(inputs), row.ours(inputs))
        return {**time_in_turn(device, row, {peer.name: call}, seconds_of(toy, quick)), "agreement": agreed}

    pairs = [(row, peer) for peer in PEERS for row in rows if peer in peers_of(row.name)]  # what compiles comes last
    return {f"{row.name}: {peer.name}": lambda row=row, peer=peer: run(row, peer) for row, peer in pairs}


def behaviour_items(device: Device, rows: list[Row], toy: bool, quick: bool) -> dict[str, Callable[[], Item]]:
    """The promises of gpu_checks.py on the shapes that are timed: there the launches have the grids of real use."""
    repeats = DRY_REPEATS if toy else 10 if quick else REPEATS

    def run(row: Row) -> Item:
        found, ours = require(device, *row.ops), device.serve(row.ours, *row.ops)
        with torch.inference_mode():
            inputs, others = (row.make(device.torch_device, seed) for seed in (0, 1))
            checked(row, inputs, ours(inputs))
            gpu_checks.promises(device, ours, inputs, others, repeats)
        return {**found, "repeats": repeats}

    return {row.name: lambda row=row: run(row) for row in rows}
