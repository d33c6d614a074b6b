"""Which specialisations a GPU would compile: launches of the wrappers, specialised by Triton's own JIT, and not run."""

import importlib
import inspect
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import tokenprune_kernels.triton as kernels
from tokenprune_kernels.triton import runtime

from .shapes import Call

GPUS = {
    "sm_80": runtime.Target("cuda", 80),
    "sm_90": runtime.Target("cuda", 90),
    "sm_100": runtime.Target("cuda", 100),
    "gfx942": runtime.Target("hip", "gfx942", 64),
}


class Specialisation(NamedTuple):
    """What Triton compiles at one time."""

    kernel: Any  # the JITFunction
    target: str
    label: str  # the first call that needs it
    key: str  # Triton's own
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]  # num_warps, num_stages, ...

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def element(self) -> str:
        """The type behind the first pointer, with which configurations change most."""
        return next((kind for kind in self.signature.values() if str(kind).startswith("*")), "")

    def described(self) -> str:
        """The kernel with its types, constants and options: what has to be known to compile it by hand."""
        names = list(self.signature)
        assumed = {
            names[path[0]]: "".join(f" {what}={value}" for what, value in a) for path, a in self.attributes.items()
        }
        types = [
            f"{name}: {kind}{assumed.get(name, '')}" for name, kind in self.signature.items() if kind != "constexpr"
        ]
        constants = [f"{names[path[0]]}={value}" for path, value in self.constants.items()]
        options = [f"{name}={value}" for name, value in self.options.items()]
        return f"{self.name}({', '.join(types + constants + options)})"


class Driver:
    """Stands in for the driver of a GPU that is not here: the JIT asks it what to compile for."""

    def __init__(self, target: str) -> None:
        self._name, wanted = target, GPUS[target]
        self._target = GPUTarget(wanted.backend, wanted.arch, wanted.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return self._name  # the JIT keeps what it knows by device

    def get_current_stream(self, device: str) -> int:
        return 0


class Recorder:
    """Collects the specialisations of launches, each once."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], Specialisation] = {}
        self.label = ""
        self._target = ""

    @contextmanager
    def on(self, target: str) -> Iterator[None]:
        """Inside, wrappers choose the configurations of this target, and their launches are collected."""
        self._target = target
        triton.runtime.driver.set_active(Driver(target))
        triton.knobs.runtime.jit_cache_hook = self._before_compilation
        runtime.recorder = self._launch
        try:
            with runtime.assume(GPUS[target]):
                yield
        finally:
            runtime.recorder = None
            triton.knobs.runtime.jit_cache_hook = None

    def _launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert all(isinstance(size, int) and size > 0 for size in grid), f"{self.label}: grid {grid}"
        assert all(size < 65536 for size in grid[1:]), f"{self.label}: grid {grid} is too large"
        # Names of kernel arguments among the keywords are constants, the rest says how to compile.
        self._options = {"enable_fp_fusion": True} | {k: v for k, v in keywords.items() if k not in kernel.arg_names}
        kernel.warmup(*args, grid=grid, **keywords | self._options)

    def _before_compilation(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002
        kernel = fn.jit_function
        where = (kernel.fn.__module__ + "." + kernel.fn.__name__, self._target, key)
        if where not in self.found:
            self.found[where] = Specialisation(
                kernel, self._target, self.label, key,
                compile["signature"], compile["constants"], compile["configs"][0], self._options,
            )  # fmt: skip
        return True  # do not compile


def record(target: str, shapes: dict[str, list[Call]]) -> list[Specialisation]:
    """The specialisations that these calls need on a target; ops without Triton kernels have none."""
    recorder = Recorder()
    with recorder.on(target):
        for op, calls in shapes.items():
            for call in calls:
                recorder.label = f"{op}: {call.name}"
                getattr(kernels, op)(**call.arguments)
    return list(recorder.found.values())


def half(found: Iterable[Specialisation]) -> list[Specialisation]:
    """The first specialisation of every kernel on every target, and every other one: odd ones on one target, even ones
    on the next, so that what is wrong on several targets is found on one of them."""
    chosen, seen = [], Counter[tuple[str, str]]()
    for w in found:
        number = seen[w.name, w.target]
        seen[w.name, w.target] += 1
        if not number or number % 2 == list(GPUS).index(w.target) % 2:
            chosen.append(w)
    return chosen


# --- what there is to be reached ------------------------------------------------------------------------------------


def modules() -> list[Any]:
    names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__))
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


def jit_functions() -> dict[str, Any]:
    """Every @triton.jit function of the package by name, kernels and helpers."""
    return {
        name: value
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }


def unused_helpers() -> list[str]:
    """Functions not called *_kernel that no other function mentions."""
    functions = jit_functions()
    return [
        name
        for name in functions
        if not name.endswith("_kernel")
        and not any(re.search(rf"\b{name}\b", f.src) for other, f in functions.items() if other != name)
    ]


def config_functions() -> dict[str, Callable[..., Any]]:
    """The functions that choose configurations: their result is annotated as one."""
    found = {}
    for module in modules():
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                result = value.__annotations__.get("return")
                if "Config" in (result if isinstance(result, str) else getattr(result, "__name__", str(result))):
                    found[f"{module.__name__.rpartition('.')[2]}.{name}"] = value
    return found


def lines_of(code: CodeType) -> set[int]:
    """The lines of a function's body."""
    return {line for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno}


@contextmanager
def executed(functions: Iterable[Callable[..., Any]]) -> Iterator[dict[CodeType, set[int]]]:
    """The lines of these functions that run inside."""
    seen: dict[CodeType, set[int]] = {inspect.unwrap(f).__code__: set() for f in functions}

    def line(frame: FrameType, event: str, _: Any) -> Any:
        seen[frame.f_code].add(frame.f_lineno)
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        return line if frame.f_code in seen else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield seen
    finally:
        sys.settrace(before)
