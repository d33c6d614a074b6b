"""Every Triton kernel compiled ahead of time for four GPUs, none of which has to be here: it compiles, fits into shared
memory, spills next to nothing, and multiplies matrices with the instructions made for that."""

import functools
import sys
from typing import Any

import pytest

from scripts import triton_resources as resources
from testing.cases import WANTED
from testing.cuda_tools import cuobjdump
from testing.triton_compile.accumulators import MOST, UNBOUNDED, longest
from testing.triton_compile.results import (
    LOCAL_LIMIT,
    SHARED_LIMIT,
    TARGETS,
    Result,
    complaints,
    matrix_instruction,
    multiplies_half_floats,
    read_amd,
    read_nvidia,
)
from tokenprune_kernels import _triton

Kernel, Usage = resources.Kernel, resources.Usage


def absent() -> str | None:
    if "triton" not in WANTED:
        return "triton is not in TOKENPRUNE_TEST_BACKENDS"
    if sys.platform != "linux":
        return "Triton compiles on Linux"
    if _triton.absent() is not None:
        return _triton.absent()
    return None if cuobjdump() else "no cuobjdump here: pip install nvidia-cuda-cuobjdump"


compiles = pytest.mark.skipif(absent() is not None, reason=str(absent()))


@functools.cache
def _compiled(*arguments: str) -> Any:
    return resources.compile_kernels(*arguments)


@pytest.fixture
def compiled(pytestconfig: pytest.Config) -> Any:
    """All kernels for all targets, half of their specialisations each: `make triton-table` compiles the rest.

    Takes minutes the first time: its progress goes to the terminal.
    """
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(flush=True)
        return _compiled("--half")


# --- the kernels ----------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_every_specialisation_compiles_and_fits_the_target(compiled: Any, target: str) -> None:
    results = [r for r in compiled.results if r.target == target]
    assert results
    wrong = complaints(results)
    assert not wrong, "\n".join(wrong)


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled_for_every_target(compiled: Any, target: str) -> None:
    kernels = {name for name in compiled.report["functions"] if name.endswith("_kernel")}
    reached = {r.kernel for r in compiled.results if r.target == target and r.compiled}
    assert reached == kernels, "kernels are named *_kernel, and testing/triton_compile/shapes.py launches each"


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_accumulators_of_long_vectors_start_anew(compiled: Any, target: str) -> None:
    """Products of every length, up to 8192, and yet no accumulator takes more than product.MOST_PRODUCTS of them."""
    from tokenprune_kernels.triton import product

    assert product.MOST_PRODUCTS.value == MOST
    took = {r.kernel: r.accumulated for r in compiled.results if r.target == target and r.products}
    assert took.keys() == {
        "attention_rows_kernel", "attention_columns_kernel", "gram_kernel", "isolated_kernel", "similarity_kernel",
        "assign_kernel",
    }  # fmt: skip
    for r in compiled.results:
        if r.target == target:
            assert (r.accumulated > 0) == r.products, r.described
            assert r.accumulated <= MOST, r.described


@compiles
def test_the_table_of_calls_reaches_every_op_and_configuration(compiled: Any) -> None:
    report = compiled.report
    assert {*report["ops"], *report["without kernels"]} == set(_triton.served())
    assert not report["unreached lines"], f"functions that choose configurations: {report['unreached lines']}"


@compiles
def test_kernels_stay_within_their_budget(compiled: Any) -> None:
    version, budget = resources.read_table(resources.TABLE.read_text())
    got = resources.summary(compiled.results)
    unlisted = list(resources.unlisted(got, budget))
    assert not unlisted, "\n".join([*unlisted, resources.REFRESH])
    if version != compiled.version:
        pytest.skip(f"the numbers are those of triton {version}; this is triton {compiled.version}")
    excesses = list(resources.excesses(got, budget))
    assert not excesses, "\n".join([*excesses, resources.REFRESH])


def test_the_table_is_as_the_script_writes_it() -> None:
    version, table = resources.read_table(resources.TABLE.read_text())
    assert resources.table_text(version, table) == resources.TABLE.read_text(), resources.REFRESH
    assert {kernel.target for kernel in table} == set(TARGETS)
    assert all(usage.local <= LOCAL_LIMIT for usage in table.values())


# --- the checks can fail --------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_bad_kernels_are_complained_about(target: str) -> None:
    found = _compiled("--bad")
    assert found.status == 1
    by_name = {r.kernel: r for r in found.results if r.target == target}
    assert by_name.keys() == {"too_much_shared_kernel", "spilling_kernel", "drifting_kernel", "refused_kernel"}
    (shared,) = complaints([by_name["too_much_shared_kernel"]])
    assert f"needs 262144 bytes of shared memory, {target} has {SHARED_LIMIT[target]}\n" in shared
    spills = complaints([by_name["spilling_kernel"]])
    assert any("bytes of each thread's values in memory" in what for what in spills)
    assert any("spills" in what for what in spills) == (target == "gfx942")
    drifting = complaints([by_name["drifting_kernel"]])  # of AMD's accumulators the assembly says nothing
    assert [what.partition("\n")[0] for what in drifting] == (
        [] if target == "gfx942" else [f"{target}, bad: adds more than 128 products in one accumulator"]
    )
    (refused,) = complaints([by_name["refused_kernel"]])
    assert "does not compile" in refused
    assert "this kernel is not for compiling" in refused


FINE = Result("k", "sm_90", "op: call", "k()", registers=200, shared=SHARED_LIMIT["sm_90"], products=True, matrix="mma")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"error": "no"}, "does not compile: no"),
        ({"shared": SHARED_LIMIT["sm_90"] + 1}, "needs 232449 bytes of shared memory, sm_90 has 232448"),
        ({"local": 24}, "keeps 24 bytes of each thread's values in memory"),
        ({"spilled": 3}, "spills 3 registers"),
        ({"matrix": ""}, "multiplies matrices without matrix instructions"),
        ({"accumulated": MOST + 16}, "adds more than 128 products in one accumulator"),
    ],
)
def test_every_fault_has_its_complaint(changed: dict[str, Any], said: str) -> None:
    assert complaints([FINE]) == []
    assert complaints([FINE._replace(**changed)]) == [f"sm_90, op: call: {said}\n    k()"]


def test_matrix_products_and_instructions_are_recognised() -> None:
    product = "    %acc_5 = tt.dot %a, %b, %acc : tensor<64x32x{0}> * tensor<32x64x{0}> -> tensor<64x64xf32>"
    assert multiplies_half_floats(product.format("f16"))
    assert multiplies_half_floats(product.format("bf16").replace("%acc :", "%acc, inputPrecision = ieee :"))
    assert not multiplies_half_floats(product.format("f32"))
    assert not multiplies_half_floats("%0 = arith.mulf %a, %b : tensor<64x32xf16>")
    assert matrix_instruction("sm_80", "\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {") == "mma.sync"
    assert matrix_instruction("sm_90", "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16") == "wgmma.mma_async"
    assert matrix_instruction("sm_100", "tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ]") == "tcgen05.mma"
    assert matrix_instruction("gfx942", "v_mfma_f32_32x32x8_f16 v[0:15], v[16:17]") == "v_mfma"
    assert matrix_instruction("gfx942", "mma.sync") == matrix_instruction("sm_80", "v_mfma_f32") == ""


MMA_PTX = """
	mov.b32 	%r9, 0f00000000;
$L__BB0_1:                              // %loop
	mov.b32 	%r1, {start};
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{ %r1, %r2 }}, {{ %r5 }}, {{ %r6 }}, {{ %r1, %r9 }};
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{ %r1, %r2 }}, {{ %r5 }}, {{ %r6 }}, {{ %r1, %r2 }};
	add.f32 	%r3, %r3, %r1;
	@%p1 bra 	$L__BB0_1;
	ret;
"""
WGMMA_PTX = """
$L__BB0_1:
	mov.pred 	%p2, {first};
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {{%r1,%r2}}, %rd1, %rd2, %p2, 1, 1, 0, 0;
	mov.pred 	%p3, -1;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {{%r1,%r2}}, {{%r5, %r6}}, %rd2, %p3, 1, 1, 0;
	@%p1 bra 	$L__BB0_1;
"""
TENSOR_MEMORY_PTX = """
$L__BB0_1:
	@%p9 bra 	$L__BB0_2;
	mov.pred 	%p2, {first};
	@%p4 tcgen05.mma.cta_group::1.kind::f16 [ %r7 + 0 ], %rd1, %rd2, %r8, %p2;
$L__BB0_2:
	@%p4 tcgen05.mma.cta_group::1.kind::f16 [ %r7 + 0 ], %rd1, %rd2, %r8, %p3;
	mov.pred 	%p3, -1;
	@%p1 bra 	$L__BB0_1;
"""


def test_products_in_an_accumulator_are_counted() -> None:
    assert longest("\tadd.f32 \t%r3, %r3, %r1;") == 0
    assert longest(MMA_PTX.format(start="%r9")) == 32
    assert longest(MMA_PTX.format(start="%r3")) == 32  # what was added by the ordinary units starts anew
    assert longest(MMA_PTX.format(start="%r2")) == 64  # %r2 itself starts anew, from %r9
    assert longest(MMA_PTX.format(start="%r1")) == UNBOUNDED
    assert longest(WGMMA_PTX.format(first="0")) == 32
    assert longest(WGMMA_PTX.format(first="-1")) == UNBOUNDED
    assert longest(TENSOR_MEMORY_PTX.format(first="0")) == 32  # the jump is for warps that issue neither
    assert longest(TENSOR_MEMORY_PTX.format(first="-1")) == UNBOUNDED


def test_what_the_tools_print_is_read() -> None:
    usage = " Function k:\n  REG:38 STACK:{} SHARED:0 LOCAL:{} CONSTANT[0]:568 TEXTURE:0\n"
    assert read_nvidia("Resource usage:\n Common:\n  GLOBAL:0\n" + usage.format(0, 0)) == {"registers": 38, "local": 0}
    assert read_nvidia(usage.format(16, 0) + usage.format(0, 24)) == {"registers": 38, "local": 24}
    with pytest.raises(ValueError, match="cuobjdump said"):
        read_nvidia("nothing")
    lines = "; ScratchSize: {}\n .private_segment_fixed_size: {}\n .vgpr_count:     64\n .vgpr_spill_count: {}\n"
    assert read_amd(lines.format(0, 0, 0)) == {"registers": 64, "local": 0, "spilled": 0}
    assert read_amd(lines.format(4, 8, 2)) == {"registers": 64, "local": 8, "spilled": 2}
    with pytest.raises(ValueError, match="says nothing of"):
        read_amd("; ScratchSize: 0")


# --- the budget -----------------------------------------------------------------------------------------------------


def test_the_summary_holds_the_worst_of_all_specialisations() -> None:
    results = [
        FINE._replace(registers=40, shared=64, matrix="mma.sync"),
        FINE._replace(registers=30, shared=128, matrix="wgmma.mma_async", local=8),
        FINE._replace(registers=20, shared=0, matrix=""),
        FINE._replace(target="gfx942", spilled=1),
    ]
    assert resources.summary(results) == {
        Kernel("k", "sm_90"): Usage(3, 40, 128, 8, "mma.sync+wgmma.mma_async"),
        Kernel("k", "gfx942"): Usage(1, 200, SHARED_LIMIT["sm_90"], 0, "mma"),
    }


def test_every_kind_of_excess_is_reported() -> None:
    a, b, c = (Kernel(name, "sm_80") for name in "abc")
    allowed = {a: Usage(3, 32, 512, 0, "mma.sync"), b: Usage(1, 40, 0, 0, "")}
    assert not list(resources.excesses({a: Usage(3, 30, 500, 0, "mma.sync")}, allowed))
    assert list(resources.excesses({a: Usage(2, 33, 513, 1, "")}, allowed)) == [
        "a for sm_80: 33 registers, the table allows 32",
        "a for sm_80: 513 bytes of shared memory, the table allows 512",
        "a for sm_80: 1 bytes of local memory, the table allows 0",
        "a for sm_80: specialisations 2, the table says 3",
        "a for sm_80: matrix , the table says mma.sync",
    ]
    assert list(resources.unlisted({a: allowed[a], c: allowed[b]}, allowed)) == [
        "b for sm_80 is only in the table",
        "c for sm_80 is only in the code",
    ]
    assert resources.read_table(resources.table_text("3.9.0", allowed)) == ("3.9.0", allowed)
