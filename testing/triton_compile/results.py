"""What compiling one specialisation gave, and what is wrong with it. Needs no Triton."""

import re
from typing import NamedTuple

from .accumulators import MOST

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Two to four values that a loop does not change, parked in front of it: not worth a smaller tile.
LOCAL_LIMIT = 16
MATRIX = {"cuda": ("tcgen05.mma", "wgmma.mma_async", "mma.sync"), "hip": ("v_mfma",)}


class Result(NamedTuple):
    """One specialisation, compiled; JSON and back."""

    kernel: str
    target: str
    label: str
    described: str
    registers: int = 0
    shared: int = 0  # bytes
    local: int = 0  # bytes of a thread's memory: spilled registers, and arrays that are indexed at run time
    spilled: int = 0  # vector registers, where the compiler counts them (AMD)
    matrix: str = ""  # the kind of matrix instruction in it
    products: bool = False  # multiplies matrices of 16-bit floats
    accumulated: int = 0  # the most products that one accumulator of a matrix unit takes (NVIDIA)
    error: str = ""
    seconds: float = 0.0  # of CPU time
    compiled: bool = True  # False: it is another's turn, see record.half


def multiplies_half_floats(ttir: str) -> bool:
    return re.search(r"tt\.dot .*: tensor<[\dx]*x(?:f16|bf16)> \* ", ttir) is not None


def read_nvidia(text: str) -> dict[str, int]:
    """The largest numbers of a `cuobjdump --dump-resource-usage`: the kernel's, and its functions' where there are."""
    registers = [int(n) for n in re.findall(r"\bREG:(\d+)", text)]
    stack = [int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", text)]
    if not registers or not stack:
        raise ValueError(f"cuobjdump said {text!r}")
    return {"registers": max(registers), "local": max(stack)}


def read_amd(amdgcn: str) -> dict[str, int]:
    def number(pattern: str) -> int:
        found = re.search(pattern + r":\s*(\d+)", amdgcn)
        if found is None:
            raise ValueError(f"the assembly says nothing of {pattern}")
        return int(found[1])

    scratch = max(number("; ScratchSize"), number(r"\.private_segment_fixed_size"))
    return {"registers": number(r"\.vgpr_count"), "local": scratch, "spilled": number(r"\.vgpr_spill_count")}


def matrix_instruction(target: str, assembly: str) -> str:
    return next((name for name in MATRIX["hip" if target.startswith("gfx") else "cuda"] if name in assembly), "")


def complaints(results: list[Result]) -> list[str]:
    """What is wrong with them, in words; none for kernels that may be used."""
    found = []
    for r in results:
        wrong = []
        if r.error:
            wrong.append(f"does not compile: {r.error}")
        if r.shared > SHARED_LIMIT[r.target]:
            wrong.append(f"needs {r.shared} bytes of shared memory, {r.target} has {SHARED_LIMIT[r.target]}")
        if r.spilled:
            wrong.append(f"spills {r.spilled} registers")
        if r.local > LOCAL_LIMIT:
            wrong.append(f"keeps {r.local} bytes of each thread's values in memory")
        if r.products and not r.matrix:
            wrong.append("multiplies matrices without matrix instructions")
        if r.accumulated > MOST:
            wrong.append(f"adds more than {MOST} products in one accumulator")
        found += [f"{r.target}, {r.label}: {what}\n    {r.described}" for what in wrong]
    return found
