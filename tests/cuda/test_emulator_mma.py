"""The tensor cores of the emulator: every rounding they can be set to, against exact integer arithmetic."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def lanes_of_mma() -> tuple[list, list, list]:
    """(row, column) of the elements that each lane holds, after the PTX ISA's figures for m16n8k16."""
    a, b, d = [], [], []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        a.append([
            (group if i < 2 or 4 <= i < 6 else group + 8, thread * 2 + (i & 1) + (0 if i < 4 else 8)) for i in range(8)
        ])  # fmt: skip
        b.append([(thread * 2 + (i & 1) + (0 if i < 2 else 8), group) for i in range(4)])
        d.append([(group if i < 2 else group + 8, thread * 2 + (i & 1)) for i in range(4)])
    return a, b, d


LANES_A, LANES_B, LANES_D = lanes_of_mma()


def held(matrix: Tensor, lanes: list) -> Tensor:
    """What each lane holds of a matrix."""
    rows, columns = torch.tensor(lanes).unbind(-1)
    return matrix[rows, columns]


def mma(broken: ModuleType, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a [16, 16] @ b [16, 8] + c [16, 8] by one instruction."""
    name = {torch.half: "multiply_half", torch.bfloat16: "multiply_bfloat16"}[a.dtype]
    operands = ((a, LANES_A), (b, LANES_B), (c, LANES_D))
    registers = torch.cat([held(m, lanes).contiguous().view(torch.int32) for m, lanes in operands], dim=1).contiguous()
    out, result = torch.empty(32, 4), torch.empty(16, 8)
    status = broken.run(name, 1, (32, 1, 1), 0, 1, False, registers.data_ptr(), out.data_ptr(), 0)
    assert status == "cudaSuccess"
    rows, columns = torch.tensor(LANES_D).unbind(-1)
    result[rows, columns] = out
    return result


def cut(value: int, unit: int) -> int:
    """Towards zero to a multiple of the unit."""
    return value // unit * unit if value >= 0 else -(-value // unit * unit)


def modelled(x: Tensor, y: Tensor, c: float, group: int, extra_bits: int) -> float:
    """c + sum of x * y, groups of products cut to the bits of the largest term; in integers of 2^-200."""
    point = 200

    def fixed(value: float) -> int:
        numerator, denominator = value.as_integer_ratio()
        return (numerator << point) // denominator

    total = fixed(c)
    for begin in range(0, len(x), group):
        pairs = [(float(p), float(q)) for p, q in zip(x[begin : begin + group], y[begin : begin + group], strict=True)]
        terms = [(fixed(p * q), math.frexp(p)[1] + math.frexp(q)[1] - 2) for p, q in pairs if p * q]
        if total:
            terms.append((total, abs(total).bit_length() - 1 - point))
        if not terms:
            continue
        unit = 1 << (max(exponent for _, exponent in terms) - 23 - extra_bits + point)
        total = sum(cut(value, unit) for value, _ in terms)
        total = cut(total, 1 << max(0, abs(total).bit_length() - 24))
    return float(math.ldexp(total, -point))


over_types = pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16], ids=["float16", "bfloat16"])


@over_types
@pytest.mark.parametrize("rounding", ["truncate", "nearest"])
def test_mma_is_the_matrix_product_in_the_layout_of_the_isa(broken, rounding, dtype):
    """On small integers, which no rounding changes, in every order of the lanes."""
    kinds, settings = broken.Schedule, broken.settings()
    settings.mma_rounding = getattr(broken.MmaRounding, rounding)
    a, b, c = (torch.randint(-9, 10, shape).float() for shape in ((16, 16), (16, 8), (16, 8)))
    for settings.schedule in (kinds.forward, kinds.reversed, kinds.shuffled):
        assert torch.equal(mma(broken, a.to(dtype), b.to(dtype), c), a @ b + c)


@over_types
@pytest.mark.parametrize("extra_bits", [0, 1, 2, 3])
@pytest.mark.parametrize("group", [4, 8, 16])
def test_truncation_is_that_of_the_model_to_the_bit(broken, group, extra_bits, dtype):
    settings: Any = broken.settings()
    settings.mma_group, settings.mma_extra_bits = group, extra_bits
    scale = torch.randint(-6, 7, (16, 16)).float().exp2()
    a, b, c = (torch.randn(16, 16) * scale).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8) * 8
    a[3], b[:, 2], c[5] = 0, 0, 0
    got = mma(broken, a, b, c)
    for row in range(16):
        for column in range(8):
            want = modelled(a[row], b[:, column], float(c[row, column]), group, extra_bits)
            assert float(got[row, column]) == want, (row, column)


@pytest.mark.parametrize(
    ("group", "extra_bits", "product", "want"),
    [
        (16, 0, 2.0**-24, 1.0),  # each product is below the last bit of the accumulator
        (16, 1, 2.0**-24, 1 + 2.0**-20),  # and kept by one more bit
        (4, 0, -(2.0**-24), 1.0),  # towards zero term by term, not of the sum: exactly it would be less than 1
        (4, 2, 2.0**-25, 1 + 2.0**-21),  # four products reach the last bit, four times over
        (4, 3, 2.0**-26, 1.0),  # four products do not, and what a group leaves below that bit is cut off
        (8, 3, 2.0**-26, 1 + 2.0**-22),  # eight do, twice over
    ],
)
def test_bits_that_are_kept_and_lost(broken, group, extra_bits, product, want):
    settings: Any = broken.settings()
    settings.mma_group, settings.mma_extra_bits = group, extra_bits
    a, b = torch.full((16, 16), product * 2.0**12).half(), torch.full((16, 8), 2.0**-12).half()
    assert mma(broken, a, b, torch.ones(16, 8)).unique().tolist() == [want]
    assert mma(broken, -a, b, -torch.ones(16, 8)).unique().tolist() == [-want]


def test_the_default_is_the_worst_of_all_settings(broken):
    """On products of one sign, where every cut goes the same way."""
    a, b, c = torch.rand(16, 16).half(), torch.rand(16, 8).half(), torch.rand(16, 8) * 64
    exact = a.double() @ b.double() + c.double()

    def lost() -> float:
        return float((exact - mma(broken, a, b, c).double()).mean())

    default = lost()
    settings: Any = broken.settings()
    others = []
    for settings.mma_group in (4, 8, 16):
        for settings.mma_extra_bits in (0, 1, 2, 3):
            others.append(lost())
    settings.mma_rounding = broken.MmaRounding.nearest
    assert default == max(others) > 0
    assert abs(lost()) < min(others)


def test_infinities_and_nan_pass_through(broken):
    a, b, c = torch.ones(16, 16).half(), torch.ones(16, 8).half(), torch.zeros(16, 8)
    a[0, 3], a[1, 5], a[2, 7], c[3, 0] = math.inf, -math.inf, math.nan, math.inf
    a[4, 1], a[4, 2] = math.inf, -math.inf
    got = mma(broken, a, b, c)
    assert got[0].tolist() == [math.inf] * 8
    assert got[1].tolist() == [-math.inf] * 8
    assert bool(got[2].isnan().all())
    assert got[3].tolist() == [math.inf] + [16.0] * 7
    assert bool(got[4].isnan().all())
    big = torch.full((16, 16), 2.0**127).bfloat16()
    assert mma(broken, big, torch.ones(16, 8).bfloat16(), c[:1].expand(16, 8) * 0).unique().tolist() == [math.inf]
