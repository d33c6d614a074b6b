"""The calls that need a GPU, and nothing else: timer, graph, streams, memory, profiler. `Host` is the same on a CPU.

`Host` runs the emulated CUDA kernels (or the CPU kernels, where an op is not ported), measures with the host's clock
and captures nothing. With it the whole suite runs without a GPU, which is how its control flow is tested.
`using("triton")` is the same device with its ops served by the Triton kernels, interpreted on the CPU.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from tokenprune_kernels import _backend, _registry, _triton
from tokenprune_kernels._op import OPS

SPIN_CYCLES = 20_000_000  # about 10 ms on a GPU: work that comes too early is sure to come before its end
SYNCHRONIZING = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
PROFILED_CALLS = 5
LIMITS = (
    "name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size", "regs_per_multiprocessor",
    "shared_memory_per_block_optin", "shared_memory_per_multiprocessor", "max_threads_per_multi_processor", "warp_size",
)  # fmt: skip


class MissingError(Exception):
    """The op has no kernel in this build."""


class UnavailableError(Exception):
    """What is asked for is not there; the message says what."""


@dataclass
class Captured:
    """A graph and the outputs that every replay writes."""

    replay: Callable[[], None]
    outputs: list[Tensor]


def flat(result: Any) -> list[Tensor]:
    """Tensors of an op's or a function's result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for r in result for t in flat(r)] if isinstance(result, (list, tuple)) else []


def kernels_of(trace: dict[str, Any], calls: int) -> dict[str, Any]:
    """What one of `calls` equal calls put on the device, from the profiler's trace: every kernel with the median of its
    microseconds and its launch plan, the number of copies and fills, and how often the host waited."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    region = next(e for e in events if e["name"] == "tokenprune_region" and e.get("cat") == "user_annotation")
    inside = [e for e in events if region["ts"] <= e["ts"] <= region["ts"] + region["dur"]]
    each = len(kernels) // calls
    found: dict[str, Any] = {
        "kernels": len(kernels) / calls if len(kernels) % calls else each,
        "copies_and_fills": sum(e.get("cat") in ("gpu_memcpy", "gpu_memset") for e in events) / calls,
        "synchronizations": sum(e["name"] in SYNCHRONIZING for e in inside),
    }
    if len(kernels) % calls == 0:
        found["plan"] = [
            {"kernel": e["name"][:160], "us": round(median(k["dur"] for k in kernels[i::each]), 3),
             **{name: e["args"].get(key) for name, key in PLANNED.items()}}
            for i, e in enumerate(kernels[:each])
        ]  # fmt: skip
    return found


PLANNED = {"grid": "grid", "block": "block", "registers": "registers per thread", "shared": "shared memory"}


class Cuda:
    real = True

    def __init__(self, forced: str | None = None) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.forced = forced  # the backend of all ops, methods included, or None: what `auto` chooses

    def using(self, backend: str) -> "Cuda":
        return Cuda(backend)

    def has_kernel(self, op: str) -> bool:
        if self.forced == "triton":
            return _triton.absent() is None
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenprune::{op}", "CUDA")

    def op(self, op: str) -> Callable[..., Any]:
        """The Python function on the backend under test, asked for by name."""
        return partial(getattr(tp, op), backend=self.forced or "cuda")

    def serve(self, f: Callable[..., Any], *ops: str) -> Callable[..., Any]:
        """The function, which calls the package as users do, with its ops on the backend under test."""
        return f if self.forced is None else on_backend(f, self.forced)

    def set_plan(self, text: str) -> None:
        """Overrides of the launch plans, as TOKENPRUNE_PLAN has them."""
        _registry._binary.set_plan(text)

    def limits(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {name: getattr(properties, name) for name in LIMITS if hasattr(properties, name)}

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def broken(self) -> str | None:
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.torch_device).item()
        except Exception as error:
            return str(error)[:300]
        return None

    def times(self, f: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds between events around each of `repeats` runs in a row."""
        pairs = []
        for _ in range(repeats):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            f()
            after.record()
            pairs.append((before, after))
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]

    def capture(self, f: Callable[[], Any]) -> Captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # handles and lazily loaded modules, outside of the capture
                f()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = f()
        return Captured(graph.replay, flat(result))

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[Any]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            yield stream

    def spin(self) -> None:
        torch.cuda._sleep(SPIN_CYCLES)

    def join(self, stream: Any) -> None:
        """What is launched from now on waits for what was launched on the side stream."""
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)

    def finish(self, stream: Any) -> None:
        """The host waits for this stream."""
        stream.synchronize()

    @contextlib.contextmanager
    def forbid_synchronization(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def launches(self, f: Callable[[], Any]) -> dict[str, Any]:
        """`kernels_of` a few calls, by the profiler."""
        from torch.profiler import ProfilerActivity, profile, record_function

        f()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function("tokenprune_region"):
                for _ in range(PROFILED_CALLS):
                    f()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            return kernels_of(json.loads(file.read_text()), PROFILED_CALLS)

    def peak_bytes(self, f: Callable[[], Any]) -> int | None:
        """Device memory that one call holds at most, its outputs included, beyond what was there before."""
        f()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = f()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def l2_bytes(self) -> int:
        return int(getattr(torch.cuda.get_device_properties(self.torch_device), "L2_cache_size", 0)) or 64 << 20

    def empty_launch(self) -> None:
        torch.cuda._sleep(0)


def on_backend(f: Callable[..., Any], backend: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with tp.use_backend(backend):
            return f(*args)

    return run


class Host:
    """The CPU twin. Its numbers mean nothing and are marked as a dry run wherever they are written."""

    real = False

    def __init__(self, emulate: bool = True, forced: str | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.forced = forced
        self.no_emulator: str | None = None if emulate else "not asked for"
        if not emulate:
            return
        try:
            import emulator

            _backend._extra["emulator"] = emulator.ops(), "cuda"
        except Exception as error:
            self.no_emulator = f"{type(error).__name__}: {str(error)[:300]}"

    def using(self, backend: str) -> "Host":
        return Host(emulate=False, forced=backend)

    def has_kernel(self, op: str) -> bool:
        if self.forced == "triton":
            return _triton.absent() is None and _triton.interpreted()
        if self.no_emulator is not None or "cuda" not in OPS[op].backends:
            return False
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenprune_emulated::{op}", "CPU")

    def _backend(self, *ops: str) -> str:
        return (self.forced or "emulator") if all(map(self.has_kernel, ops)) else "auto"

    def op(self, op: str) -> Callable[..., Any]:
        return partial(getattr(tp, op), backend=self._backend(op))

    def serve(self, f: Callable[..., Any], *ops: str) -> Callable[..., Any]:
        return on_backend(f, self._backend(*ops))

    def set_plan(self, text: str) -> None:
        if self.no_emulator is None:
            import emulator

            emulator.load().set_plan(text)

    def limits(self) -> dict[str, Any]:
        return {"name": "emulated" if self.no_emulator is None else "none"}

    def synchronize(self) -> None:
        pass

    def broken(self) -> str | None:
        return None

    def times(self, f: Callable[[], Any], repeats: int) -> list[float]:
        measured = []
        for _ in range(repeats):
            began = time.perf_counter()
            f()
            measured.append(time.perf_counter() - began)
        return measured

    def capture(self, f: Callable[[], Any]) -> Captured:
        outputs = flat(f())

        def replay() -> None:
            for old, new in zip(outputs, flat(f()), strict=True):
                old.copy_(new)

        return Captured(replay, outputs)

    def side_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def spin(self) -> None:
        pass

    def join(self, stream: Any) -> None:
        pass

    def finish(self, stream: Any) -> None:
        pass

    def forbid_synchronization(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def launches(self, f: Callable[[], Any]) -> dict[str, Any]:
        if self.no_emulator is not None:
            return {"kernels": None, "synchronizations": None}
        import emulator

        module = emulator.load()
        module.take_launches()
        f()
        made = module.take_launches()
        return {"kernels": len(made), "plan": made, "copies_and_fills": 0, "synchronizations": 0}

    def peak_bytes(self, f: Callable[[], Any]) -> int | None:
        f()
        return None

    def free_bytes(self) -> int:
        return 1 << 27

    def l2_bytes(self) -> int:
        return 1 << 20

    def empty_launch(self) -> None:
        pass


Device = Cuda | Host


def dry() -> bool:
    """Is the CPU twin asked for?"""
    return os.environ.get("TOKENPRUNE_TEST_GPU") == "emulated"


def pick() -> Device:
    """The device of this process, or UnavailableError."""
    if dry():
        return Host()
    if not torch.cuda.is_available():
        raise UnavailableError("torch finds no CUDA device")
    reason = _backend.unavailable("cuda", "cuda")
    if reason is not None:
        raise UnavailableError(reason)
    return Cuda()
