"""Malformed calls of every op, each made from one number; test_fuzz.py runs them in processes of their own.

    python -m tests.ops.fuzz SEED COUNT [FILE]

makes the calls of COUNT numbers from SEED on. Each has to return usable memory or to raise one of five errors, and well
formed calls in between have to work. FILE holds the number of the current call, also after a crash.
Sizes between 10^6 and 2^40 are avoided, because memory for them might really be there.
"""

import contextlib
import faulthandler
import json
import os
import random
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import tokenprune_kernels as tp
from testing import op_samples as samples
from testing.op_samples import OPS, SAMPLES, Call, Sizes, make, outputs, positional

ALLOWED = (RuntimeError, IndexError, ValueError, TypeError, MemoryError)
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int64),
    *(torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.uint64, torch.complex32),
)
FLOATS = DTYPES[:4]
HUGE = (-(2**63), -(2**62), -(2**31), -2, -1, 0, 1, 2, 3, 2**40, 2**61, 2**62, 2**63 - 1)
WORDS = ("mean", "max", "sum", "last", "none", "", "max+last", "+", "mean+", "cosine", "riesz", "gaussian", "outlier",
         "isolated", "index", "soft", "hard", "\0", "é" * 50, "x" * 10_000)  # fmt: skip
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.25, 0.5, 2.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
SECONDS = 120  # that a call may take, under a sanitizer and beside other processes


def any_tensor(rng: random.Random) -> Tensor:
    """Any rank, dtype, layout, values and kind; now and then without storage on the meta device."""
    dtype = rng.choice(DTYPES)
    if rng.random() < 0.1:
        shape = [rng.choice((0, 1, 3, 2**19)) for _ in range(rng.randrange(4))]
        return torch.empty(shape, dtype=dtype, device="meta")
    shape = [rng.randrange(6) for _ in range(rng.randrange(6))]
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    values = torch.randint(-1, 6, shape, generator=generator)
    t = spoil(rng, values if dtype == torch.int64 else (torch.randn(shape, generator=generator) + values).to(dtype))
    return strange(rng, t) if rng.random() < 0.3 else t


def spoil(rng: random.Random, t: Tensor) -> Tensor:
    """Special values, and strides that are zero, permuted, or enormous where a size of one allows it."""
    if t.numel() and t.dtype in FLOATS and rng.random() < 0.5:
        t.view(-1)[rng.randrange(t.numel())] = torch.tensor(rng.choice(NUMBERS), dtype=torch.float64).to(t.dtype)
    if t.numel() and t.dtype == torch.int64 and rng.random() < 0.3:
        t.view(-1)[rng.randrange(t.numel())] = rng.choice(HUGE)
    layout = rng.randrange(6) if t.dim() else -1
    if layout == 0:
        return t.permute(rng.sample(range(t.dim()), t.dim()))
    if layout == 1:
        far = (2**40, 2**61, 0)
        return t.as_strided(
            t.shape, [rng.choice(far) if size <= 1 else s for size, s in zip(t.shape, t.stride(), strict=True)]
        )
    if layout == 2:
        strides = [rng.choice((0, 1, 2, 3, 7)) for _ in t.shape]
        memory = torch.zeros(
            1 + sum(max(size - 1, 0) * s for size, s in zip(t.shape, strides, strict=True)) + t.numel(), dtype=t.dtype
        )
        if t.dtype in (*FLOATS, torch.int64):
            memory[: t.numel()] = t.reshape(-1)
        return memory.as_strided(t.shape, strides)
    return t


class Subclass(Tensor):
    """A tensor as libraries derive them, through __torch_function__."""


def _huge_strides(rng: random.Random, t: Tensor) -> Tensor:
    """Some dimensions beyond every memory, by stride 0."""
    sizes = [rng.choice((2**40, 2**47, 2**61, 2**62)) if rng.random() < 0.5 else -1 for _ in t.shape]
    return t[tuple(slice(None if s < 0 else 1) for s in sizes)].expand(sizes)


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _two(t: Tensor) -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(t, t.clone())


KINDS: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "subclass": lambda rng, t: t.as_subclass(Subclass),
    "parameter": lambda rng, t: torch.nn.Parameter(t, requires_grad=False),
    "two tensors": lambda rng, t: _two(t),
    "nested": lambda rng, t: torch.nested.nested_tensor([t[0]] * rng.choice((0, 1, 2, len(t)))),
    "jagged": lambda rng, t: torch.nested.nested_tensor([t[0]] * max(len(t), 1), layout=torch.jagged),
    "sparse": lambda rng, t: t.to_sparse(),
    "rows": lambda rng, t: t.to_sparse_csr(),
    "columns": lambda rng, t: t.to_sparse_csc(),
    "mkldnn": lambda rng, t: t.to_mkldnn(),
    "quantised": lambda rng, t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "quantised channels": lambda rng, t: torch.quantize_per_channel(
        t.float(), torch.full((len(t),), 0.1), torch.zeros(len(t)), 0, torch.qint8
    ),
    "zero": lambda rng, t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "negative": lambda rng, t: torch._neg_view(t),
    "conjugate": lambda rng, t: t.to(torch.complex64).conj(),
    "imaginary": lambda rng, t: t.to(torch.complex64).conj().imag,
    "inference": lambda rng, t: _inference(t),
    "dlpack": lambda rng, t: torch.from_dlpack(t),
    "huge strides": _huge_strides,
    "bytes": lambda rng, t: (t.to(torch.uint8) * 37 + 2).view(torch.bool),
    "requires grad": lambda rng, t: t.detach().requires_grad_(),
    "functional": lambda rng, t: torch._to_functional_tensor(t),
    "meta": lambda rng, t: t.to("meta"),
}


def strange(rng: random.Random, t: Tensor) -> Tensor:
    """The tensor as another kind, or itself where torch has none of that kind."""
    with contextlib.suppress(Exception):
        return KINDS[rng.choice(tuple(KINDS))](rng, t)
    return t


def any_value(rng: random.Random, kind: str) -> Any:
    """Something for an argument of this schema type, mostly of the right Python type."""
    if rng.random() < 0.05:
        return rng.choice((None, "text", 3, 2.5, [], [1]))
    if kind.startswith("Optional[") and rng.random() < 0.3:
        return None
    kind = kind.removeprefix("Optional[").rstrip("]")
    if kind == "List[Tensor":
        return [any_tensor(rng) for _ in range(rng.randrange(5))]
    if kind == "List[int":
        return [rng.choice(HUGE) if rng.random() < 0.1 else rng.randrange(-3, 5) for _ in range(rng.randrange(5))]
    if kind == "Tensor":
        return any_tensor(rng)
    return rng.choice({"int": HUGE, "float": NUMBERS, "bool": (False, True), "str": WORDS}[kind])


def schema_of(op: str) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in getattr(torch.ops.tokenprune, op).default._schema.arguments]


def garbage(rng: random.Random) -> Call:
    """Arbitrary arguments."""
    op = rng.choice(OPS)
    return Call(op, {name: any_value(rng, kind) for name, kind in schema_of(op)})


def spoiled(rng: random.Random) -> Call:
    """What gets past the checks: a sample, some of its arguments spoiled, of another kind, or replaced."""
    op, name = rng.choice(SAMPLES)
    batch, tokens, rows, channels, k, listed, axes = (rng.choice((0, 1, 2, 5, 9)) for _ in range(7))
    kv_heads = rng.choice((1, 2))
    sizes = Sizes(batch, tokens, rows, channels, 2 * kv_heads, kv_heads, k, listed, axes)
    call = make(op, name, sizes, rng.choice(FLOATS))
    call = samples.map_tensors(call, lambda _, t: spoil(rng, t.contiguous().clone()) if rng.random() < 0.3 else t)
    if rng.random() < 0.5:
        one = rng.choice([n for n, _, _ in samples.tensors(call)])
        call = samples.map_tensors(call, lambda n, t: strange(rng, t) if n == one or rng.random() < 0.05 else t)
    for which, kind in rng.sample(schema_of(op), rng.choice((0, 0, 0, 1, 2))):
        call = samples.with_arguments(call, **{which: any_value(rng, kind)})
    return call


# --- the states of the dispatcher that a call may find ----------------------------------------------------------------


def _each_tensor(call: Call, f: Callable[[Tensor], Tensor]) -> Call:
    return samples.map_tensors(call, lambda _, t: f(t)) if _well_typed(call) else call


def _well_typed(call: Call) -> bool:
    listed = call.arguments.get("tensors", [])
    if not isinstance(listed, list) or len(call.arguments.get("batch_dims") or listed) < len(listed):
        return False
    return all(isinstance(t, Tensor) for t in listed)


def _mapped(rng: random.Random, call: Call, function: Callable[[Call], Any]) -> Any:
    """Under vmap: one tensor has another dimension, or is nested; two deep at times."""
    names = [n for n, _, _ in samples.tensors(call)] if _well_typed(call) else []
    if not names:
        return function(call)
    which, dim = rng.choice(names), rng.choice((0, 0, 0, -1))
    t = next(t for n, t, _ in samples.tensors(call) if n == which)
    many = torch.nested.nested_tensor([t] * rng.randrange(3)) if rng.random() < 0.2 else torch.stack([t, t], dim)
    twice = rng.random() < 0.2

    def one(x: Tensor) -> Any:
        changed = samples.map_tensors(call, lambda n, t: x if n == which else t)
        return torch.vmap(lambda _: function(changed))(torch.arange(2)) if twice else function(changed)

    return torch.vmap(one, in_dims=dim)(many)


def _dual(rng: random.Random, call: Call, function: Callable[[Call], Any]) -> Any:
    """Forward-mode differentiation, with tangents that have no memory."""

    def dual(t: Tensor) -> Tensor:
        if t.is_nested or 0 in t.shape or max(t.shape, default=0) > 10**6:  # make_dual visits every element
            return t
        tangent = torch._efficientzerotensor(t.shape, dtype=t.dtype) if rng.random() < 0.5 else torch.ones_like(t)
        return forward_ad.make_dual(t, tangent) if t.is_floating_point() else t

    with forward_ad.dual_level():
        return function(_each_tensor(call, dual))


def _within(context: Callable[[], Any]) -> Callable[[random.Random, Call, Callable[[Call], Any]], Any]:
    def run(rng: random.Random, call: Call, function: Callable[[Call], Any]) -> Any:
        with context():
            return function(call)

    return run


def _without_key(key: str) -> Callable[[], Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


STATES: dict[str, Callable[[random.Random, Call, Callable[[Call], Any]], Any]] = {
    "plain": lambda rng, call, function: function(call),
    "vmap": _mapped,
    "dual": _dual,
    "no_grad": _within(torch.no_grad),
    "inference mode": _within(torch.inference_mode),
    "fake tensors": _within(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
    "autocast": _within(lambda: torch.autocast("cpu")),
    "functionalised": lambda rng, call, function: torch.func.functionalize(lambda: function(call))(),
    "below autograd": _within(torch._C._AutoDispatchBelowAutograd),
    "zeros left alone": _within(_without_key("ZeroTensor")),
    "negatives left alone": _within(_without_key("Negative")),
    "conjugates left alone": _within(_without_key("Conjugate")),
}


def attempt(rng: random.Random, call: Call) -> bool:
    """Through one or all entrances; what comes back has to be usable memory. Did one return?"""
    entrances: list[Callable[..., Any]] = [
        getattr(torch.ops.tokenprune, call.op),
        getattr(tp, call.op),
        lambda *args, **kwargs: getattr(tp, call.op)(*args, **kwargs, backend="reference"),
    ]
    state = STATES["plain" if rng.random() < 0.5 else rng.choice(tuple(STATES))]
    returned = False
    for entrance in entrances if rng.random() < 0.3 else rng.sample(entrances, 1):

        def function(given: Call, entrance: Callable[..., Any] = entrance) -> Any:
            args, kwargs = positional(given)
            return entrance(*args, **kwargs)

        with contextlib.suppress(*ALLOWED):
            for out in outputs(state(rng, call, function)):
                returned = True
                if not out.is_meta and out.layout == torch.strided and not out.is_nested and out.numel() < 10**6:
                    out.clone()
    return returned


def assert_good_calls_work(op: str) -> None:
    for name in samples.FACTORIES[op]:
        args, kwargs = positional(make(op, name, Sizes(tokens=11, channels=8, k=4)))
        function = getattr(tp, op)
        got, want = (outputs(function(*args, **kwargs, backend=backend)) for backend in (None, "reference"))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, equal_nan=True)


def _numbered(first: int, count: int, file: str | None) -> Iterator[int]:
    """The numbers, each written down before its call is made."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT) if file else None
    for seed in range(first, first + count):
        if descriptor is not None:
            os.pwrite(descriptor, b"%20d" % seed, 0)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        yield seed
    faulthandler.cancel_dump_traceback_later()


def main(first: int, count: int, file: str | None = None) -> None:
    warnings.simplefilter("ignore")
    faulthandler.enable()
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which maps terabytes
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), -1))
    returned: Counter[str] = Counter(dict.fromkeys(OPS, 0))
    for seed in _numbered(first, count, file):
        rng = random.Random(seed)
        call = (garbage if rng.random() < 0.3 else spoiled)(rng)
        returned[call.op] += attempt(rng, call)
        if seed % 50 == 0:
            assert_good_calls_work(OPS[seed // 50 % len(OPS)])
    print(json.dumps(returned))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
