"""What the contract promises of a call besides its values: determinism, streams, graphs, untouched inputs, no waiting.

Each check takes a device, a function of named inputs, and the inputs; it raises AssertionError. tests/cuda/test_gpu.py
runs them on the samples of every op, bench/gpu_suite on the shapes that are timed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from testing.gpu_device import Device, flat

Inputs = dict[str, Any]
Function = Callable[[Inputs], Any]
WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    """The memory of a tensor as integers: NaN equals NaN, 0.0 differs from -0.0."""
    return t.contiguous().view(WIDTHS[t.element_size()])


def assert_same_bits(got: list[Tensor], want: list[Tensor], what: str) -> None:
    assert len(got) == len(want), what
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype, f"{what}: output {i} is {g.dtype}, expected {w.dtype}"
        assert g.shape == w.shape, f"{what}: output {i} has shape {list(g.shape)}, expected {list(w.shape)}"
        different = int((bits(g) != bits(w)).sum())
        assert different == 0, f"{what}: output {i} differs in {different} of {g.numel()} elements"


def tensors(inputs: Inputs) -> list[Tensor]:
    return [t for value in inputs.values() for t in flat(value)]


def _each(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with other tensors, those in lists too."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return (
            [change(t) for t in value] if isinstance(value, list) and value and isinstance(value[0], Tensor) else value
        )

    return {name: of(value) for name, value in inputs.items()}


def copied(inputs: Inputs) -> Inputs:
    """The same inputs in memory of their own, with the same strides."""
    return _each(lambda t: t.clone(memory_format=torch.preserve_format), inputs)


def overwrite(inputs: Inputs, others: Inputs) -> None:
    """Puts other values into the same memory."""
    for mine, other in zip(tensors(inputs), tensors(others), strict=True):
        mine.copy_(other)


def changed(inputs: Inputs) -> Inputs:
    """Other values of the same kind: floats, masks and positions rolled along the tokens, index lists as they are."""
    return _each(lambda t: t.roll(1, -1) if t.is_floating_point() or t.dtype == torch.bool else t.clone(), inputs)


def determinism(device: Device, f: Function, inputs: Inputs, repeats: int = 50) -> None:
    """The same bits every time, also while other work keeps the device busy on another stream."""
    first = flat(f(inputs))
    device.synchronize()
    for repeat in range(repeats):
        if repeat % 2:
            with device.side_stream() as other:
                noise = torch.randn(256, 256, device=device.torch_device)
                for _ in range(4):
                    noise = noise @ noise * 1e-2
            again = flat(f(inputs))
            device.join(other)
        else:
            again = flat(f(inputs))
        assert_same_bits(again, first, f"repeat {repeat}")


def inputs_unchanged(device: Device, f: Function, inputs: Inputs) -> None:
    before = [t.clone() for t in tensors(inputs)]
    f(inputs)
    assert_same_bits(tensors(inputs), before, "an input after the call")


def graph(device: Device, f: Function, inputs: Inputs, others: Inputs) -> None:
    """A captured call computes anew what its inputs hold at each replay."""
    buffers = copied(inputs)
    captured = device.capture(lambda: f(buffers))
    for values in (others, inputs, others):
        overwrite(buffers, values)
        for output in captured.outputs:
            bits(output).fill_(0x5A)  # a replay that wrote nothing would show
        captured.replay()
        device.synchronize()
        assert_same_bits(captured.outputs, flat(f(copied(values))), "a replay")


def streams(device: Device, f: Function, inputs: Inputs, others: Inputs) -> None:
    """Work goes to the current stream: after what produces the inputs there, before who waits for that stream.

    The inputs hold other values until a copy that is queued behind a long wait on the side stream; a launch on any
    other stream would read those.
    """
    want = flat(f(inputs))
    buffers, landing = copied(others), [torch.empty_like(w) for w in want]
    device.synchronize()
    with device.side_stream() as side:
        device.spin()
        overwrite(buffers, inputs)
        got = flat(f(buffers))
    with device.side_stream() as reader:
        device.join(side)
        for target, g in zip(landing, got, strict=True):
            target.copy_(g)
    device.join(reader)
    device.synchronize()
    assert_same_bits(landing, want, "on a side stream")


def no_waiting(device: Device, f: Function, inputs: Inputs) -> None:
    """The host never waits for the device. (A captured graph proves it too: waiting is an error during a capture.)"""
    f(inputs)
    device.synchronize()
    with device.forbid_synchronization():
        f(inputs)
    device.synchronize()


def two_threads(device: Device, f: Function, inputs: Inputs, others: Inputs, repeats: int = 10) -> None:
    """Two threads that call at the same time, each on a stream of its own, get what one alone gets."""
    wanted = [flat(f(x)) for x in (inputs, others)]
    device.synchronize()

    def work(x: Inputs) -> list[list[Tensor]]:
        with torch.inference_mode(), device.side_stream() as stream:
            got = [flat(f(x)) for _ in range(repeats)]
            device.finish(stream)
        return got

    with ThreadPoolExecutor(2) as pool:
        for got, want in zip(pool.map(work, (inputs, others)), wanted, strict=True):
            for one in got:
                assert_same_bits(one, want, "beside another thread")


def promises(device: Device, f: Function, inputs: Inputs, others: Inputs, repeats: int, threads: bool = True) -> None:
    """All of the above; `others` are inputs of the same shapes."""
    inputs_unchanged(device, f, inputs)
    determinism(device, f, inputs, repeats)
    no_waiting(device, f, inputs)
    streams(device, f, inputs, others)
    graph(device, f, inputs, others)
    if threads:
        two_threads(device, f, inputs, others, min(repeats, 10))


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; infinite when one has a NaN or an infinity that the other has not."""
    got, want = got.double(), want.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def close(got: Any, want: Any, tolerance: float = 1e-3) -> dict[str, float]:
    """Integers equal, floats within the tolerance; the largest relative error."""
    worst = 0.0
    for i, (g, w) in enumerate(zip(flat(got), flat(want), strict=True)):
        assert g.shape == w.shape, f"output {i} has shape {list(g.shape)}, expected {list(w.shape)}"
        if w.is_floating_point():
            error = relative_error(g, w)
            assert error <= tolerance, f"output {i}: relative error {error:.2e}, allowed {tolerance:.0e}"
            worst = max(worst, error)
        else:
            wrong = int((g != w).sum())
            assert wrong == 0, f"output {i}: {wrong} of {g.numel()} elements differ"
    return {"relative_error": worst}


def agreement(got: Any, ours: Any) -> dict[str, Any]:
    """How far two results agree, in the outputs that both have: floats by their largest relative error, integers by the
    share that is equal, and by the share that both have somewhere."""
    pairs = [(g.reshape(o.shape), o) for g, o in zip(flat(got), flat(ours), strict=False) if g.numel() == o.numel()]
    whole = [(g, o) for g, o in pairs if not o.is_floating_point()]
    errors = [relative_error(g, o) for g, o in pairs if o.is_floating_point()]
    compared = sum(o.numel() for _, o in whole)
    return {
        "relative_error": max(errors, default=None),
        "equal_integers": sum(int((g == o).sum()) for g, o in whole) / compared if compared else None,
        "in_common": [len({*g.flatten().tolist()} & {*o.flatten().tolist()}) / max(o.numel(), 1) for g, o in whole],
    }
