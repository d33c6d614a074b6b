"""The order of candidates: one table, which order.h, order.py and every op that selects by it have to agree with.

order.h runs through the emulator's module, order.py through Triton's interpreter.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from testing.cases import NO_EMULATOR, NO_TRITON, RUNNERS, over_backends, over_dtypes

FORMATS = {torch.float16: (5, 10), torch.bfloat16: (8, 7), torch.float32: (8, 23), torch.float64: (11, 52)}
INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}  # by bits
NO_KEY, NAN_KEY = 0, 1

in_cpp = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
in_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
masked = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def table(dtype: torch.dtype) -> tuple[list[list[int]], list[int]]:
    """The bits of numbers, best first, those that tie in one list; and those of NaN, which tie behind all of them."""
    exponent, mantissa = FORMATS[dtype]
    sign, infinity = 1 << (exponent + mantissa), ((1 << exponent) - 1) << mantissa
    one, normal = ((1 << exponent - 1) - 1) << mantissa, 1 << mantissa
    positive = [infinity, infinity - 1, one + 1, one, normal, normal - 1, 1]  # down to the smallest subnormal number
    numbers = [[bits] for bits in positive] + [[0, sign]] + [[sign | bits] for bits in reversed(positive)]
    quiet = infinity | 1 << (mantissa - 1)
    return numbers, [infinity + 1, quiet, sign | quiet, 2 * sign - 1]


def key_of(bits: int, dtype: torch.dtype) -> int:
    sign = 1 << sum(FORMATS[dtype])
    if bits in table(dtype)[1]:
        return NAN_KEY
    return sign if bits in (0, sign) else 2 * sign - 1 - bits if bits & sign else bits | sign


def tensor_of(bits: list[int], dtype: torch.dtype) -> Tensor:
    width = 8 * dtype.itemsize
    signed = [b - (1 << width) if b >> (width - 1) else b for b in bits]
    return torch.tensor(signed, dtype=INTEGERS[width]).view(dtype)


class Candidates:
    """Every entry of the table twice, in a scattered order; `masked`: without a third of them."""

    def __init__(self, dtype: torch.dtype, masked: bool, numbers: list[list[int]] | None = None) -> None:
        all_numbers, nans = table(dtype)
        ranked = [*enumerate(numbers or all_numbers), (-1, nans)]  # -1: behind every number, in either direction
        drawn = [(rank, bits) for rank, tied in ranked for bits in tied for _ in range(2)]
        drawn = [drawn[i] for i in torch.randperm(len(drawn), generator=torch.Generator().manual_seed(7))]
        self.rank = [rank for rank, _ in drawn]
        self.values = tensor_of([bits for _, bits in drawn], dtype).unsqueeze(0)
        self.n = len(drawn)
        self.valid = [not masked or i % 3 != 1 for i in range(self.n)]
        self.mask = torch.tensor([self.valid]) if masked else None

    def best_first(self, largest: bool = True, without: tuple[int, ...] = ()) -> list[int]:
        def order(i: int) -> tuple[bool, int, int]:
            return self.rank[i] < 0, self.rank[i] if largest else -self.rank[i], i

        return sorted((i for i in range(self.n) if self.valid[i] and i not in without), key=order)

    def sizes(self) -> tuple[int, ...]:
        return 1, self.n // 3, sum(self.valid) - 1, self.n + 3


def padded(indices: list[int], k: int) -> Tensor:
    return torch.tensor([indices + [-1] * (k - len(indices))])


# --- order.h ---------------------------------------------------------------------------------------------------------


@in_cpp
@over_dtypes
class TestKeysInCpp:
    def functions(self, dtype: torch.dtype) -> tuple[Any, Any]:
        import emulator

        name = str(dtype).removeprefix("torch.")
        module = emulator.load()
        return getattr(module, f"order_key_{name}"), getattr(module, f"reversed_key_{name}")

    def test_keys_descend_along_the_table(self, dtype) -> None:
        order_key, _ = self.functions(dtype)
        numbers, nans = table(dtype)
        keys = [{order_key(bits) for bits in tied} for tied in [*numbers, nans]]
        assert all(len(tied) == 1 for tied in keys)
        each = [key for tied in keys for key in tied]
        assert each == sorted(set(each), reverse=True)
        assert each[-1] == NAN_KEY
        assert [order_key(bits) for tied in numbers for bits in tied] == [
            key_of(bits, dtype) for tied in numbers for bits in tied
        ]

    def test_reversed_keys_ascend(self, dtype) -> None:
        order_key, reversed_key = self.functions(dtype)
        numbers, _ = table(dtype)
        keys = [reversed_key(order_key(tied[0])) for tied in numbers]
        assert keys == sorted(keys)
        assert keys[0] > NAN_KEY
        assert [reversed_key(NO_KEY), reversed_key(NAN_KEY)] == [NO_KEY, NAN_KEY]


@in_cpp
class TestInversesInCpp:
    def test_values_come_back(self) -> None:
        import emulator

        module = emulator.load()
        numbers, nans = table(torch.float32)
        for bits in (bits for tied in [*numbers, nans] for bits in tied):
            (exact,) = (tensor_of([bits], torch.float32) + 0.0).tolist()
            (back,) = torch.tensor([module.value_of_key(key_of(bits, torch.float32))]).tolist()
            assert back == exact or (back != back and exact != exact)
            if exact >= 0:
                assert module.nonnegative_value_of_key(key_of(bits, torch.float32)) == exact
            assert module.masked_order_key(exact, True) == key_of(bits, torch.float32)
            assert module.masked_order_key(exact, False) == NO_KEY

    def test_pairs_order_by_key_and_then_by_the_lower_index(self) -> None:
        import emulator

        module = emulator.load()
        keys = [NAN_KEY, *(key_of(tied[0], torch.float32) for tied in reversed(table(torch.float32)[0]))]
        pairs = [(key, index) for key in reversed(keys) for index in (0, 1, 0x7FFFFFFF)]
        packed = [module.pack_ranked(*pair) for pair in pairs]
        assert packed == sorted(packed, reverse=True)
        assert [module.index_of_packed(both) for both in packed] == [index for _, index in pairs]
        assert module.pack_ranked(NO_KEY, 5) == 0 < packed[-1]
        for i, a in enumerate(pairs):
            assert [module.is_better(*a, *b) for b in pairs] == [i < j for j in range(len(pairs))]


# --- order.py --------------------------------------------------------------------------------------------------------

if NO_TRITON is None:
    import triton
    import triton.language as tl

    from tokenprune_kernels.triton import order, runtime

    @triton.jit
    def keys_kernel(value_ptr, valid_ptr, key_ptr, back_ptr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
        slot = tl.arange(0, BLOCK)
        key = order.order_key(tl.load(value_ptr + slot), tl.load(valid_ptr + slot) != 0, LARGEST)
        tl.store(key_ptr + slot, key.to(tl.int64))
        tl.store(key_ptr + BLOCK + slot, order.reversed_key(key).to(tl.int64))
        tl.store(back_ptr + slot, order.nonnegative_value(key))

    @triton.jit
    def pairs_kernel(key_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: N803
        slot = tl.arange(0, BLOCK)
        key, index = tl.load(key_ptr + slot).to(tl.uint32), tl.load(index_ptr + slot)
        better = order.is_better(key[:, None], index[:, None], key[None, :], index[None, :])
        tl.store(out_ptr + slot[:, None] * BLOCK + slot[None, :], better.to(tl.int8))

    @triton.jit
    def float64_kernel(value_ptr, key_ptr, BLOCK: tl.constexpr):  # noqa: N803
        slot = tl.arange(0, BLOCK)
        tl.store(key_ptr + slot, order.nonnegative_key(tl.load(value_ptr + slot)))


@in_triton
class TestKeysInTriton:
    BLOCK = 64

    def block(self, t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, self.BLOCK - len(t)))

    def keys(self, bits: list[int], valid: list[bool], largest: bool) -> tuple[list[int], list[int], list[float]]:
        values, keys = self.block(tensor_of(bits, torch.float32)), torch.empty(2, self.BLOCK, dtype=torch.int64)
        back, counts = torch.empty(self.BLOCK), self.block(torch.tensor(valid).to(torch.uint8))
        config = runtime.Config({"BLOCK": self.BLOCK})
        runtime.launch(keys_kernel, (1,), keys, values, counts, keys, back, config=config, LARGEST=largest)
        of_bits, in_reverse = keys[:, : len(bits)].tolist()
        return of_bits, in_reverse, back[: len(bits)].tolist()

    def test_keys_are_those_of_the_table(self) -> None:
        numbers, nans = table(torch.float32)
        bits = [bits for tied in [*numbers, nans] for bits in tied]
        expected = [key_of(b, torch.float32) for b in bits]
        opposite = [key if key <= NAN_KEY else 0xFFFFFFFF - key for key in expected]
        keys, reverse, back = self.keys(bits, [True] * len(bits), True)
        assert keys == expected
        assert reverse == opposite
        positive = sum(map(len, numbers)) // 2
        assert back[:positive] == tensor_of(bits[:positive], torch.float32).tolist()
        keys, reverse, _ = self.keys(bits, [True] * len(bits), False)
        assert keys == opposite
        assert reverse == expected
        for largest in (True, False):
            assert self.keys(bits, [False] * len(bits), largest) == ([NO_KEY] * len(bits),) * 2 + ([0.0] * len(bits),)

    def test_pairs_order_by_key_and_then_by_the_lower_index(self) -> None:
        keys = [key_of(tied[0], torch.float32) for tied in table(torch.float32)[0]]
        pairs = [(key, index) for key in [*keys, NAN_KEY] for index in (0, 1, 0x7FFFFFFF)]
        key, index = (self.block(torch.tensor(column)) for column in zip(*pairs, strict=True))
        out = torch.empty(self.BLOCK, self.BLOCK, dtype=torch.int8)
        runtime.launch(pairs_kernel, (1,), out, key, index, out, config=runtime.Config({"BLOCK": self.BLOCK}))
        n = len(pairs)
        assert torch.equal(out[:n, :n] != 0, torch.ones(n, n).triu(1).bool())

    def test_float64_keys_of_shares(self) -> None:
        bits = [tied[0] for tied in table(torch.float64)[0] if not tied[0] >> 63]
        keys = torch.empty(self.BLOCK, dtype=torch.int64)
        values = self.block(tensor_of(bits, torch.float64))
        runtime.launch(float64_kernel, (1,), keys, values, keys, config=runtime.Config({"BLOCK": self.BLOCK}))
        got = keys[: len(bits)].tolist()
        assert got == sorted(set(got), reverse=True)
        assert got[-1] > NO_KEY
        assert got[0] < order.TOP_64.value


# --- the ops ---------------------------------------------------------------------------------------------------------


@over_backends
@over_dtypes
@masked
class TestOps:
    @pytest.mark.parametrize("largest", [True, False])
    def test_select_topk(self, backend, dtype, masked, largest) -> None:
        c = Candidates(dtype, masked)
        for k in c.sizes():
            indices, counts = RUNNERS[backend]("select_topk", c.values, k, mask=c.mask, largest=largest)
            chosen = sorted(c.best_first(largest)[:k])
            assert torch.equal(indices, padded(chosen, k))
            assert counts.tolist() == [len(chosen)]

    def test_select_two_tailed(self, backend, dtype, masked) -> None:
        c = Candidates(dtype, masked)
        for k in c.sizes():
            for low in {1, k // 2, k}:
                number = torch.tensor([low])
                indices, counts = RUNNERS[backend]("select_two_tailed", c.values, number, k, mask=c.mask)
                high = c.best_first()[: k - low]
                chosen = sorted(high + c.best_first(False, tuple(high))[:low])
                assert torch.equal(indices, padded(chosen, k))
                assert counts.tolist() == [len(chosen)]

    def test_select_mixture_keeps_the_best_of_each_list(self, backend, dtype, masked) -> None:
        c = Candidates(dtype, masked)
        nothing = torch.zeros_like(c.values)
        text, visual = torch.cat([c.values, nothing], 1), torch.cat([nothing, c.values], 1)
        mask = None if c.mask is None else torch.cat([c.mask, c.mask], 1)
        positive = sum(0 <= c.rank[i] < 7 for i in range(c.n) if c.valid[i])
        for half in (1, positive // 2, positive):
            outputs = RUNNERS[backend]("select_mixture", text, visual, 2 * half, floor=0.5, mask=mask)
            best = sorted(c.best_first()[:half])
            assert torch.equal(outputs[0], torch.tensor([best + [c.n + i for i in best]]))
            assert [t.tolist() for t in outputs[1:]] == [[2 * half], [half]]

    def test_select_mixture_fills_by_the_greater_share(self, backend, dtype, masked) -> None:
        numbers = table(dtype)[0]
        few = [numbers[3], numbers[4], [bits for tied in numbers[7:] for bits in tied]]  # the last ones count as 0
        c = Candidates(dtype, masked, few)
        c.rank = [2 if rank < 0 else rank for rank in c.rank]  # and so does NaN
        for k in (2, 4, 6, sum(c.valid) - 1):
            indices, counts, _ = RUNNERS[backend]("select_mixture", c.values, c.values, k, floor=0.25, mask=c.mask)
            assert indices.tolist() == [sorted(c.best_first()[:k])]
            assert counts.tolist() == [k]

    @pytest.mark.parametrize("aggregate", ["max", "sum"])
    def test_repulsion_sample(self, backend, dtype, masked, aggregate) -> None:
        """Tokens that are orthogonal to each other: the energy alone decides, the lowest first."""
        c = Candidates(dtype, masked)
        features = torch.eye(c.n, dtype=dtype).unsqueeze(0)
        for k in c.sizes():
            indices, counts = RUNNERS[backend](
                "repulsion_sample", features, k, energy=c.values, mask=c.mask, aggregate=aggregate
            )
            picks = c.best_first(False)[:k]
            assert torch.equal(indices, padded(picks, k))
            assert counts.tolist() == [len(picks)]

    @pytest.mark.parametrize("mode", ["soft", "hard"])
    def test_spatial_semantic_nms(self, backend, dtype, masked, mode) -> None:
        """Tokens that are far from each other: the score alone decides."""
        c = Candidates(dtype, masked)
        positions = torch.stack([torch.arange(c.n), torch.zeros(c.n)], 1).to(dtype).unsqueeze(0)
        features = torch.ones(1, c.n, 4, dtype=dtype)
        for k in c.sizes():
            indices, selected, counts = RUNNERS[backend](
                "spatial_semantic_nms", c.values, features, positions, k, mask=c.mask, radius=0.5, mode=mode
            )
            picks = c.best_first()[:k]
            assert torch.equal(indices, padded(picks, k))
            expected = torch.nn.functional.pad(c.values[:, picks], (0, k - len(picks))).to(selected.dtype)
            torch.testing.assert_close(selected, expected, rtol=0, atol=0, equal_nan=True)
            assert counts.tolist() == [len(picks)]
