"""Compiles one specialisation and reads from the machine code what it costs."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from testing.cuda_tools import cuobjdump

from .accumulators import longest
from .record import GPUS, Specialisation
from .results import Result, matrix_instruction, multiplies_half_floats, read_amd, read_nvidia


def compile_one(wanted: Specialisation) -> Result:
    began = cpu_seconds()
    result = Result(wanted.name, wanted.target, wanted.label, wanted.described())
    try:
        gpu = GPUS[wanted.target]
        source = ASTSource(wanted.kernel, wanted.signature, wanted.constants, wanted.attributes)
        compiled = triton.compile(
            source, target=GPUTarget(gpu.backend, gpu.arch, gpu.warp_size), options=wanted.options
        )
        result = measured(result, compiled.asm, compiled.metadata.shared)
    except Exception as error:  # whatever the compiler raises is the result
        result = result._replace(error=f"{type(error).__name__}: {error}"[-2000:])
    return result._replace(seconds=round(cpu_seconds() - began, 2))


def cpu_seconds() -> float:
    """The CPU time of this process and of what it waited for: ptxas, and the linker of AMD."""
    return sum(os.times()[:4])


def measured(result: Result, asm: dict[str, Any], shared: int) -> Result:
    text = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    usage = read_nvidia(resource_usage(asm["cubin"])) if "cubin" in asm else read_amd(text)
    matrix = matrix_instruction(result.target, text)
    return result._replace(
        shared=shared, matrix=matrix, products=multiplies_half_floats(asm["ttir"]),
        accumulated=longest(asm["ptx"]) if "ptx" in asm else 0, **usage,
    )  # fmt: skip


def resource_usage(cubin: bytes) -> str:
    tool = cuobjdump()
    assert tool is not None, "no cuobjdump here: pip install nvidia-cuda-cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        done = subprocess.run([tool, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True)
    return done.stdout
