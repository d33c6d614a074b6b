"""The cost gate of the machine code: how it counts, and what it allows (docs/kernels.md has how to read it)."""

import functools
import subprocess
from pathlib import Path

import pytest

from scripts import cuda_costs as costs
from scripts import machine_code
from testing import cuda_kernels as kernels
from testing.cuda_tools import cuobjdump, nvdisasm

from .test_build import build

Cost, Kernel, Limit = costs.Cost, kernels.Kernel, costs.Limit


# --- the tables -----------------------------------------------------------------------------------------------------


@functools.cache
def table() -> tuple[str, costs.Table]:
    return costs.read_table(costs.TABLE.read_text())


def need_disassembler() -> None:
    if cuobjdump() is None or nvdisasm() is None:
        pytest.skip("no cuobjdump or nvdisasm here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def test_no_kernel_costs_more_than_its_limit() -> None:
    excesses = list(costs.excesses(table()[1], costs.read_limits(costs.LIMITS.read_text())))
    assert not excesses, "\n".join(excesses)


def test_the_tables_are_as_the_script_writes_them() -> None:
    limits = costs.LIMITS.read_text()
    assert costs.table_text(*table()) == costs.TABLE.read_text(), kernels.REFRESH
    assert costs.limits_text(costs.read_limits(limits)) == limits
    assert {kernel.family for kernel in table()[1]} == set(kernels.families()), kernels.REFRESH


@pytest.mark.parametrize("family", kernels.families())
def test_the_table_has_the_costs_of_the_build(family: str) -> None:
    if costs.ARCHITECTURE not in {kernel.architecture for kernel in build()}:
        pytest.skip(f"the build has no code for {costs.ARCHITECTURE}, which the table is for")
    if kernels.nvcc_version() != table()[0]:
        pytest.skip(f"the table is that of nvcc {table()[0]}; this is nvcc {kernels.nvcc_version()}")
    need_disassembler()
    found = costs.read_file(kernels.OBJECTS / f"{family}.cu.o", costs.ARCHITECTURE)
    built = {kernel: cost for kernel, (cost, _) in found.items()}
    said = {kernel: cost for kernel, cost in table()[1].items() if kernel.family == family}
    differences = list(costs.differences(built, said))
    assert not differences, "\n".join([*differences, kernels.REFRESH])


def test_every_kind_of_excess_is_reported() -> None:
    a, b, c = (Kernel("toy", name, "sm_90a") for name in ("f<float>", "g", "h"))
    cost = Cost(100, 40, 30, 4, 16, 16, 20, 10, 100, 80, 1, 1, 2)
    limits = {
        "f<": Limit(100, 12.5, 8.8, 1, 1, 2, 2),
        "g": Limit(99, 12.4, 8.7, 0, 0, 1, 2),
        "i": Limit(1, 0, 0, 0, 0, 0, 1),
    }
    assert list(costs.excesses({a: cost, b: cost, c: cost}, limits)) == [
        "toy.cu: h for sm_90a has no limit in tests/cuda/limits.csv",
        "toy.cu: g for sm_90a: instructions is 100, the limit of g is 99",
        "toy.cu: g for sm_90a: per_unit is 12.5, the limit of g is 12.4",
        "toy.cu: g for sm_90a: per_unit_least is 8.8, the limit of g is 8.7",
        "toy.cu: g for sm_90a: split is 1, the limit of g is 0",
        "toy.cu: g for sm_90a: fences is 1, the limit of g is 0",
        "toy.cu: g for sm_90a: barriers is 2, the limit of g is 1",
        "tests/cuda/limits.csv: no kernel's name begins with i",
    ]
    assert list(costs.differences({a: cost, b: cost}, {a: cost._replace(slots=41), c: cost})) == [
        "toy.cu: g for sm_90a is only in the build",
        "toy.cu: h for sm_90a is only in the table",
        "toy.cu: f<float> for sm_90a: slots is 40, the table says 41",
    ]


def test_limits_are_lowered_but_not_raised() -> None:
    kernel, other = (Kernel("toy", name, "sm_90a") for name in ("f<float>", "h"))
    cost = Cost(101, 40, 30, 4, 16, 16, 20, 10, 100, 80, 1, 1, 2)
    low, high = Limit(50, 1, 1, 0, 0, 0, 2), Limit(900, 900, 900, 9, 9, 9, 2)
    assert costs.tightened({kernel: cost}, {"f<": high, "g": high}) == {"f<": Limit(110, 13, 9, 1, 1, 2, 2)}
    assert costs.tightened({kernel: cost}, {"f<": low}) == {"f<": low}
    assert costs.tightened({kernel: cost, other: cost}, {"f<": low})["h"] == Limit(110, 15, 10, 1, 1, 2, 1)


# --- how it counts --------------------------------------------------------------------------------------------------

LISTING = """\
	.section	.text.toy,"ax",@progbits
.text.toy:
	//## File "/here/toy.cu", line 3
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   IMAD R1, R1, R1, R1 ;
	//## File "/here/toy.cuh", line 5
.L_x_1:
        /*0040*/                   MUFU.EX2 R0, R0 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0070*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0080*/                   FADD R0, R0, R0 ;
        /*0090*/                   FADD R0, R0, R0 ;
        /*00a0*/                   FADD R0, R0, R0 ;
.L_x_4:
        /*00b0*/                   MUFU.RCP R0, R0 ;
        /*00c0*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*00d0*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*00e0*/                   MEMBAR.ALL.GPU ;
        /*00f0*/                   UCGABAR_WAIT ;
        /*0100*/                   BRA.U UP0, `(.L_x_0) ;
        /*0110*/                   EXIT ;
.L_x_5:
        /*0120*/                   WARPSYNC.COLLECTIVE R1, `(.L_x_0) ;
        /*0130*/                   BRA `(.L_x_4) ;
.L_x_6:
        /*0140*/                   BRA `(.L_x_6);
        /*0150*/                   NOP;
"""


def test_an_iteration_takes_the_way_with_the_matrix_instruction() -> None:
    (function,) = machine_code.functions(LISTING)
    outer, inner = (costs.loop_cost(function, loop, depth) for depth, loop in machine_code.nests(function.loops))
    here = {"loads": 1, "loaded": 16, "moved": 16, "fences": 1, "barriers": 1, "nest": 13, "nest_least": 13}
    assert outer == costs.LoopCost(0, "toy.cu:3", 6, 6, **here)
    # EX2, branch, HMMA, branch, RCP, the branch for divergent warps, branch back; RCP stands behind a branch.
    assert inner == costs.LoopCost(1, "toy.cuh:5", 7, 7, matrix=1, special=2, split=1, nest=7, nest_least=7)
    assert costs.summed(function, [outer, inner]) == Cost(21, 7, 7, 1, 0, 0, 6, 6, 13, 13, 1, 1, 1)


SOFTMAX = """\
	.section	.text.toy,"ax",@progbits
.text.toy:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0020*/               @P0 BRA `(.L_x_5) ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   MUFU.EX2 R0, R0 ;
        /*0050*/                   FADD R1, R1, R0 ;
        /*0060*/                   FADD R1, R1, R0 ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_1:
        /*0080*/                   FMNMX R2, R2, R0, !PT ;
.L_x_2:
        /*0090*/                   MUFU.EX2 R0, R0 ;
        /*00a0*/               @P2 BRA `(.L_x_2) ;
        /*00b0*/                   MUFU.EX2 R0, R0 ;
        /*00c0*/                   FADD R1, R1, R0 ;
.L_x_3:
        /*00d0*/               @P3 BRA `(.L_x_4) ;
        /*00e0*/                   MUFU.EX2 R3, R3 ;
.L_x_4:
        /*00f0*/               @P4 BRA `(.L_x_5) ;
.L_x_6:
        /*0100*/                   FADD R1, R1, R1 ;
        /*0110*/               @P5 BRA `(.L_x_6) ;
.L_x_5:
        /*0120*/               @P6 BRA `(.L_x_0) ;
        /*0130*/                   EXIT ;
"""


def test_the_lightest_iteration_takes_the_exponentials_of_one_way_and_no_other() -> None:
    """As in the row pass: all rows at once, or each alone by a loop, or none of them."""
    (function,) = machine_code.functions(SOFTMAX)
    outer, alone, rest = (costs.loop_cost(function, loop, depth) for depth, loop in machine_code.nests(function.loops))
    # HMMA, two branches; EX2 and three more at once; the second EX2 behind its branch; the branch before the last loop
    # and the one back. That loop runs although it could be skipped, the one of rows alone does not.
    assert (outer.least, outer.nest_least) == (3 + 4 + 2 + 2, 11 + 2)
    # Alone: FMNMX, EX2 and FADD, and the loop between them.
    assert (outer.slots, outer.nest) == (3 + 3 + 2 + 2, 10 + 2 + 2)
    assert alone.slots == rest.slots == 2
    assert costs.summed(function, [outer, alone, rest]).around_least == 2


def test_a_loop_of_two_entries_is_a_loop() -> None:
    """Jumps into the middle make no header that dominates the others."""
    code = """\
.text.toy,"ax",@progbits
.text.toy:
        /*0000*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0010*/                   FADD R0, R0, R0 ;
.L_x_1:
        /*0020*/                   FMUL R0, R0, R0 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""
    (function,) = machine_code.functions("\t.section\t" + code)
    ((depth, loop),) = machine_code.nests(function.loops)
    assert depth == 0
    assert len(function.instructions(loop.blocks)) == 3


TINY = """\
#include <cuda_runtime.h>

__global__ void loads(const float4* x, const float* y, float* out, int n) {
  __shared__ float last;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const float4 a = x[i * 32 + threadIdx.x], b = x[i * 64 + threadIdx.x];
    sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w + y[i];
    if (threadIdx.x == 7) last = sum;
    __syncthreads();
    sum += last;
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void special(const int* choice, float* out, int n, int m) {
  float a = threadIdx.x, b = 1;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
#pragma unroll 1
    for (int j = 0; j < m; ++j) {
      asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(a));
      if (choice[j * 32]) {
        asm volatile("bar.sync 1, 32;");
#pragma unroll
        for (int k = 0; k < 9; ++k) asm volatile("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(b));
      }
    }
    __threadfence();
    out[i] = a + b;
  }
}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Cost, list[costs.LoopCost]]]:
    """The costs of two kernels whose loops are known."""
    need_disassembler()
    if kernels.nvcc_version() is None:
        pytest.skip("no nvcc here to compile the tiny kernels")
    folder = tmp_path_factory.mktemp("tiny")
    source, cubin = folder / "tiny.cu", folder / "tiny.cubin"
    source.write_text(TINY)
    target = "-gencode=arch=compute_90a,code=sm_90a"
    command = [kernels.nvcc() or "", "-cubin", "-O3", "-lineinfo", target, str(source), "-o", str(cubin)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return {kernel.name: found for kernel, found in costs.read_file(Path(cubin), "sm_90a").items()}


def test_the_loads_and_barriers_of_a_compiled_loop(tiny: dict[str, tuple[Cost, list[costs.LoopCost]]]) -> None:
    cost, (loop,) = tiny["loads"]
    assert (loop.loads, loop.loaded, loop.barriers, loop.fences, loop.special) == (3, 16 + 16 + 4, 2, 0, 0)
    assert loop.line.startswith("tiny.cu:")
    assert 10 < loop.slots < 40
    assert (cost.slots, cost.load_bytes, cost.around, cost.nest) == (loop.slots, 12, 0, loop.slots)


def test_special_functions_behind_a_branch_of_a_nested_loop(
    tiny: dict[str, tuple[Cost, list[costs.LoopCost]]],
) -> None:
    cost, (outer, inner) = tiny["special"]
    assert (outer.depth, outer.special, outer.fences, outer.barriers) == (0, 0, 1, 0)
    assert (inner.depth, inner.special, inner.split, inner.fences, inner.barriers) == (1, 10, 1, 0, 1)
    assert (cost.split, cost.fences, cost.barriers) == (1, 1, 1)
    assert (cost.around, cost.nest) == (outer.slots, outer.slots + inner.slots)
    assert inner.least <= inner.slots - 10  # the branch is not taken
