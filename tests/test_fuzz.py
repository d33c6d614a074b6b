"""Garbage in: whatever an op is called with, it returns or raises one of five errors, and the next good call works.

A crash ends the test process, which is the finding. Hypothesis draws the seed of each call, so a failure is reproduced
by one number. Sizes between 10^6 and 10^11 are avoided, because memory for them might really be there.
"""

import random
from typing import Any

import op_samples as samples
import pytest
import torch
from cases import BACKENDS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from op_samples import OPS, SAMPLES, Call, Sizes, make, outputs, positional, run, run_op

import tokenprune_kernels as tp

ALLOWED = (RuntimeError, IndexError, ValueError, TypeError, MemoryError)
FUZZ = settings(
    deadline=None,
    max_examples=150,
    print_blob=True,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a smaller seed is no simpler call
)
over_seeds = given(st.integers(0, 2**63))
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int64),
    *(torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn),
)
HUGE = (-(2**63), -(2**62), -(2**31), -2, -1, 0, 1, 2, 3, 2**40, 2**61, 2**62, 2**63 - 1)
WORDS = ("mean", "max", "sum", "last", "none", "", "max+last", "+", "mean+", "cosine", "riesz", "gaussian", "outlier",
         "isolated", "index", "soft", "hard", "\0", "é" * 50, "x" * 10_000)  # fmt: skip
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.25, 0.5, 2.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))


def any_tensor(rng: random.Random) -> torch.Tensor:
    """Any rank, dtype, layout and values; now and then without storage on the meta device."""
    dtype = rng.choice(DTYPES)
    if rng.random() < 0.1:
        shape = [rng.choice((0, 1, 3, 2**19)) for _ in range(rng.randrange(4))]
        return torch.empty(shape, dtype=dtype, device="meta")
    shape = [rng.randrange(6) for _ in range(rng.randrange(6))]
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    values = torch.randint(-1, 6, shape, generator=generator)
    return spoil(rng, values if dtype == torch.int64 else (torch.randn(shape, generator=generator) + values).to(dtype))


def spoil(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    """Special values, and strides that are zero, permuted, or enormous where a size of one allows it."""
    if t.numel() and t.dtype in DTYPES[:4] and rng.random() < 0.5:
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
        memory = t.new_zeros(1 + sum(max(size - 1, 0) * s for size, s in zip(t.shape, strides, strict=True)))
        memory[: t.numel()] = t.reshape(-1)[: memory.numel()]
        return memory.as_strided(t.shape, strides)
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


def attempt(call: Call) -> bool:
    """Through both entrances; what comes back has to be usable memory. Did one return?"""
    returned = False
    args, kwargs = positional(call)
    for function in (getattr(torch.ops.tokenprune, call.op), getattr(tp, call.op)):
        try:
            for out in outputs(function(*args, **kwargs)):
                returned = True
                if not out.is_meta and out.numel() < 10**6:
                    out.clone()
        except ALLOWED:
            pass
    return returned


def assert_good_calls_work(op: str) -> None:
    for name in samples.FACTORIES[op]:
        call = make(op, name, Sizes(tokens=11, channels=8, k=4))
        for got, want in zip(run(call, BACKENDS[0]), run(call, "reference"), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


def schema_of(op: str) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in getattr(torch.ops.tokenprune, op).default._schema.arguments]


@pytest.mark.parametrize("op", OPS)
def test_arbitrary_arguments(op: str) -> None:
    @FUZZ
    @over_seeds
    def garbage(seed: int) -> None:
        rng = random.Random(seed)
        attempt(Call(op, {name: any_value(rng, kind) for name, kind in schema_of(op)}))

    garbage()
    assert_good_calls_work(op)


@pytest.mark.parametrize(("op", "name"), SAMPLES, ids=samples.SAMPLE_IDS)
def test_good_calls_with_some_arguments_replaced(op: str, name: str) -> None:
    """Garbage that gets past the checks: the arguments of a sample, some of them spoiled or replaced."""
    returned = 0

    @FUZZ
    @over_seeds
    def garbage(seed: int) -> None:
        nonlocal returned
        rng = random.Random(seed)
        batch, tokens, rows, channels, k, listed, places = (rng.choice((0, 1, 2, 5, 9)) for _ in range(7))
        kv_heads = rng.choice((1, 2))
        sizes = Sizes(batch, tokens, rows, channels, 2 * kv_heads, kv_heads, k, listed, places)
        call = make(op, name, sizes, rng.choice(DTYPES[:4]))
        call = samples.map_tensors(call, lambda _, t: spoil(rng, t.contiguous().clone()) if rng.random() < 0.5 else t)
        for which, kind in rng.sample(schema_of(op), rng.choice((0, 0, 1, 2))):
            call = samples.with_arguments(call, **{which: any_value(rng, kind)})
        returned += attempt(call)

    garbage()
    assert returned > 20, "hardly any call got past the checks: this fuzz test exercises nothing"
    assert_good_calls_work(op)


@pytest.mark.parametrize("op", [op for op in OPS if "k" in samples.SIZES_OF[op] and op != "gather_compact"])
def test_a_k_that_no_memory_holds(op: str) -> None:
    counted = "capacity" if op == "mask_to_indices" else "k"
    for k in (2**44, 2**60, 2**62, 2**63 - 1):
        for name in samples.FACTORIES[op]:
            with pytest.raises((RuntimeError, MemoryError)):
                run_op(samples.with_arguments(make(op, name), **{counted: k}))
    assert_good_calls_work(op)
