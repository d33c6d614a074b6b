"""What nvcc made of the CUDA kernels: no spills, no more registers than the table allows, and the instructions that the
kernels were written for. Needs the build in place that `make build` leaves behind, and no GPU."""

import functools
import os
import re
import subprocess
import sys

import pytest

from scripts import cuda_resources as resources
from testing import cuda_kernels as kernels
from testing.cuda_tools import cuobjdump
from tokenprune_kernels._registry import build_info

Kernel, Usage = kernels.Kernel, resources.Usage

# What machine code has to contain, and why.
ASYNCHRONOUS = {r"LDGSTS\.\S*\b128": "tiles come by 16-byte asynchronous copies"}
TENSOR_CORES = {r"HMMA\.16816\.F32": "products on tensor cores, sums in float32"}
MATRICES = {r"LDSM\.16\.M88\.4": "operands come from shared memory four matrices at a time"}
PLAIN_FLOAT32 = {r"FFMA": "float32 products are not rounded to fewer bits"}
WIDE_LOADS = {r"LDG\.\S*\b128": "16-byte loads"}
WIDE_STORES = {r"STG\.\S*\b128": "16-byte stores"}
ONE_INCREMENT = {r"ATOMS\.POPC\.INC": "equal keys of a warp are counted by one increment"}
# Of the kernels whose names begin like this. A name without a kernel is an error: the table follows the kernels.
TILED = ("attention_rows_thin", "attention_rows_wide", "attention_columns", "tile_similarity", "gram", "isolated_keys",
         "rounds", "merge_assign", "density_products")  # fmt: skip
INSTRUCTIONS = {
    **{f"{name}_kernel<__": {**TENSOR_CORES, **MATRICES, **ASYNCHRONOUS} for name in TILED},
    **{f"{name}_kernel<float": {**PLAIN_FLOAT32, **ASYNCHRONOUS} for name in TILED},
    **{f"nms_{name}_kernel<__": {**TENSOR_CORES, **WIDE_LOADS} for name in ("lists", "select")},
    **{f"nms_{name}_kernel<float": {**PLAIN_FLOAT32, **WIDE_LOADS} for name in ("lists", "select")},
    "nms_weights_kernel<__": {**TENSOR_CORES, **ASYNCHRONOUS},
    "nms_weights_kernel<float": {**PLAIN_FLOAT32, **ASYNCHRONOUS},
    "gather_compact_kernel": {**WIDE_LOADS, **WIDE_STORES},
    "warp_similarity_kernel<": WIDE_LOADS,
    **{f"paired_cosine_kernel<{name}, true>": ASYNCHRONOUS for name in ("float", "__half", "__nv_bfloat16")},
    "merge_norms_kernel<": WIDE_LOADS,
    "merge_means_kernel<": WIDE_LOADS,
    "dpp_rows_kernel<": WIDE_LOADS,
    "coverage_greedy_kernel": WIDE_LOADS,
    "select_kernel<": ONE_INCREMENT,
    **{
        f"select_grouped_kernel<{name}, (GroupedMemory){held}": ONE_INCREMENT
        for name in ("float", "__half", "__nv_bfloat16")
        for held in (0, 1)
    },
    "mixture_kernel": ONE_INCREMENT,
}


@functools.cache
def build() -> dict:
    if kernels.nvcc_version() is None:
        pytest.skip("no nvcc here: there are no CUDA kernels to look at")
    # CI names the architectures: there the kernels have to be there.
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not build_info().get("cuda_architectures"):
        pytest.skip("the library was built without CUDA kernels; `make cuda-table` builds it with them")
    objects = [f"cuda/{family}.cu.o" for family in kernels.families()]
    folder = kernels.OBJECTS.parent
    missing = [name for name in objects if not (folder / name).exists()]
    assert not missing, f"{folder} lacks {', '.join(missing)}: run `make build`"
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-n", *objects]
    state = subprocess.run(command, capture_output=True, text=True).stdout
    assert "no work to do" in state, (
        f"the CUDA kernels are not those of the sources, run `make build`:\n{state[-2000:]}"
    )
    return resources.read_build()


@functools.cache
def table() -> tuple[str, dict]:
    return resources.read_table(resources.TABLE.read_text())


def budget() -> dict:
    """The table, for an architecture that was built."""
    if not kernels.compared(build(), table()[1]):
        built = sorted({kernel.architecture for kernel in build()})
        pytest.skip(f"the build is for {', '.join(built)}; the table is for {', '.join(resources.ARCHITECTURES)}")
    return table()[1]


def said(complaints: list[str]) -> str:
    return "\n".join([*complaints, kernels.REFRESH])


# --- the budget -----------------------------------------------------------------------------------------------------


def test_no_kernel_keeps_values_in_local_memory() -> None:
    spills = list(resources.spills(build()))
    assert not spills, "\n".join(spills)


def test_the_table_has_every_kernel_that_is_built_and_no_other() -> None:
    unlisted = list(kernels.unlisted(build(), budget()))
    assert not unlisted, said(unlisted)


def test_kernels_stay_within_their_budget() -> None:
    allowed, version = budget(), table()[0]
    if kernels.nvcc_version() != version:
        pytest.skip(f"register counts are those of nvcc {version}; this is nvcc {kernels.nvcc_version()}")
    excesses = list(resources.excesses(build(), allowed))
    assert not excesses, said(excesses)


def test_the_table_is_complete_and_as_the_script_writes_it() -> None:
    version, rows = table()
    assert resources.table_text(version, rows) == resources.TABLE.read_text(), kernels.REFRESH
    assert {kernel.architecture for kernel in rows} == set(resources.ARCHITECTURES)
    assert {kernel.family for kernel in rows} == set(kernels.families()), kernels.REFRESH


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 512 bytes smem, 416 bytes cmem[0], 80 bytes cmem[2]
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for helper
    8 bytes stack frame, 16 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
ptxas info    : Compiling entry function 'third' for 'sm_90a'
ptxas info    : Function properties for third
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers
"""


def test_a_log_is_read_as_ptxas_means_it() -> None:
    got = resources.read_log("toy", LOG, names_of=lambda names: names)
    assert got == {
        Kernel("toy", "first", "sm_80"): Usage(32, 512),
        Kernel("toy", "second", "sm_90a"): Usage(64, 0, 28, 16),
        Kernel("toy", "third", "sm_90a"): Usage(20, 0, 0, 16),
    }
    assert list(resources.spills(got)) == [
        "toy.cu: second for sm_90a spills 28 bytes",
        "toy.cu: third for sm_90a keeps 16 bytes of local variables in memory",
    ]


def test_names_are_shortened_to_what_tells_kernels_apart() -> None:
    short = kernels.short_name
    assert short("void tokenprune::f<float, (tokenprune::Kind)2>(tokenprune::P, int (*)(int))") == "f<float, (Kind)2>"
    assert short("tokenprune::(anonymous namespace)::plain(tokenprune::P)") == "plain"


def test_every_kind_of_excess_is_reported() -> None:
    a, b, c = (Kernel("toy", name, "sm_80") for name in "abc")
    elsewhere = Kernel("toy", "a", "sm_120")
    allowed = {a: Usage(32, 512), b: Usage(40, 0), elsewhere: Usage(32, 512)}
    assert not list(resources.excesses({a: Usage(30, 512)}, allowed))
    assert list(resources.excesses({a: Usage(33, 512), b: Usage(40, 16)}, allowed)) == [
        "toy.cu: a for sm_80: 33 registers, the table allows 32",
        "toy.cu: b for sm_80: 16 bytes of shared memory, the table says 0",
    ]
    assert list(kernels.unlisted({a: Usage(1, 0), c: Usage(1, 0)}, allowed)) == [
        "toy.cu: b for sm_80 is only in the table",
        "toy.cu: c for sm_80 is only in the build",
    ]
    assert resources.read_table(resources.table_text("13.0.88", allowed)) == ("13.0.88", allowed)


# --- the instructions -----------------------------------------------------------------------------------------------


def disassembler() -> str:
    return cuobjdump() or pytest.skip("no cuobjdump here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


@functools.cache
def code() -> dict[str, str]:
    """The machine code of every kernel, by name, for one of the architectures that were built."""
    built = {kernel.architecture for kernel in build()}
    architecture = "sm_90a" if "sm_90a" in built else max(built, key=lambda a: int(re.sub(r"\D", "", a)))
    found: dict[str, str] = {}
    for family in kernels.families():
        command = [disassembler(), "-sass", "-arch", architecture, str(kernels.OBJECTS / f"{family}.cu.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-500:]}\n{done.stderr[-500:]}"
        _, *functions = re.split(r"^\s*Function : ", done.stdout, flags=re.MULTILINE)
        names = kernels.demangle([function.split("\n", 1)[0].strip() for function in functions])
        found |= dict(zip(names, functions, strict=True))
    return found


def test_kernels_that_wait_for_a_launch_read_nothing_of_it_early() -> None:
    """Read-only loads may be made before the wait; only masks, which are bytes, are arguments in every call."""
    waiting = {kernel: text for kernel, text in code().items() if "ACQBULK" in text}
    if not waiting:
        pytest.skip("built for architectures without dependent launches")
    early = [kernel for kernel, text in waiting.items() if re.search(r"\bLDG\.E(?!\.U8)\S*\.CONSTANT\b", text)]
    assert not early, "\n".join(early)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_kernels_contain_the_instructions_they_were_written_for(name: str) -> None:
    matching = [kernel for kernel in code() if kernel.startswith(name)]
    assert matching, f"no kernel is called {name!r}; there are:\n" + "\n".join(sorted(code()))
    lacking = [
        f"{kernel} has no {instruction}: {reason}"
        for kernel in matching
        for instruction, reason in INSTRUCTIONS[name].items()
        if not re.search(rf"\b{instruction}\b", code()[kernel])
    ]
    assert not lacking, "\n".join(lacking)
